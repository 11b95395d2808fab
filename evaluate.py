"""Accuracy of a model on test problems of every domain, mean@n at temperature 1 and greedy, and the closing table."""

import random

import runs
from data.arithmetic import BUDGET, DOMAINS, make_problem, verify
from data.documents import plain_prompt
from data.tokenizer import END, decode, encode
from model import GPT, generate


def all_domains(home: str) -> tuple[str, ...]:
    """All of DOMAINS, and the domain trained on where it is not one of them."""
    return tuple(dict.fromkeys((*DOMAINS, home)))


def held_out_problems(domain: str, count: int, seed: int) -> list[str]:
    rng = random.Random(f"test {domain} {seed}")
    return [make_problem(domain, rng, test=True) for _ in range(count)]


def evaluate(
    model: GPT,
    domains: tuple[str, ...],
    problems: int = 64,
    samples: int = 16,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> dict[str, dict]:
    """domain -> mean@samples, greedy accuracy, shares of short cuts and unfinished rollouts, and their counts."""
    result = {}
    for domain in domains:
        texts = held_out_problems(domain, problems, seed)
        prompts = [encode(plain_prompt(problem)) for problem in texts]
        sampled = generate(
            model,
            prompts,
            BUDGET,
            END,
            samples,
            temperature,
            top_k,
            top_p,
            runs.torch_generator("evaluate", domain, seed),
        )
        verdicts = [verify(texts[i // samples], decode(tokens)) for i, tokens in enumerate(sampled)]
        greedy = generate(model, prompts, BUDGET, END, temperature=0)
        greedy_right = sum(
            verify(problem, decode(tokens)).correct for problem, tokens in zip(texts, greedy, strict=True)
        )
        n = len(verdicts)
        result[domain] = {
            "mean": sum(v.correct for v in verdicts) / n,
            "correct": sum(v.correct for v in verdicts),
            "greedy": greedy_right / problems,
            "shortcut": sum(v.shortcut for v in verdicts) / n,
            "unfinished": sum(not v.finished for v in verdicts) / n,
            "problems": problems,
            "samples": samples,
        }
    return result


def comparison(results: list[dict]) -> str:
    """The closing table: mean@n of base and runs in every domain, the training domain first, and style in domain."""
    home = results[0]["config"]["domain"]
    away = [domain for domain in DOMAINS if domain != home]

    def row(name: str, scores: dict) -> list[str]:
        out_of_domain = sum(scores[domain]["mean"] for domain in away) / len(away)
        columns = [scores[home]["mean"], out_of_domain, *(scores[domain]["mean"] for domain in away)]
        columns += [scores[home]["greedy"], scores[home]["shortcut"], scores[home]["unfinished"]]
        return [name, *(f"{100 * value:.1f}" for value in columns)]

    header = [f"mean@{results[0]['config']['eval_samples']}, %", f"{home} (in domain)", "OOD average", *away]
    rows = [row("base", results[0]["before"]), *(row(result["name"], result["after"]) for result in results)]
    return runs.markdown_table([*header, "greedy", "short cuts", "unfinished"], rows)
