"""Accuracy of a model on test problems of every domain, mean@n, and the closing table."""

import random
from typing import Any

import torch

from data import Problem, Task, Verdict
from data.chains import CHECK_MARK, STEP
from harness.cli import markdown_table
from harness.files import checksum
from harness.run import RunConfig, seeded
from losses import token_logprobs
from model import GPT, pad, response_logprobs
from sampling import generate


def answer(
    model: GPT, task: Task, problems: list[Problem], samples: int = 1, **sampling: Any
) -> tuple[list[str], list[Verdict]]:
    """The texts of a model's responses, and their verdicts; the samples of a problem lie side by side."""
    prompts = [task.encode(task.prompt(problem)) for problem in problems]
    written = generate(model, prompts, task.max_response, task.stop, samples, **sampling)
    texts, verdicts = list(map(task.decode, written)), []
    for i, (text, tokens) in enumerate(zip(texts, written, strict=True)):
        verdicts.append(task.verify(problems[i // samples], text, ended=tokens[-1] in task.stop))
    return texts, verdicts


def evaluate(
    model: GPT,
    task: Task,
    domains: tuple[str, ...],
    problems: int = 512,
    samples: int = 2,
    seed: int = 0,
    drawn_for: str = "",
    **sampling: Any,
) -> dict[str, dict]:
    """domain -> mean@samples, shares of habits and of unfinished responses, and the mean length in characters.

    The problems are drawn by the seed and by `drawn_for`, a name of the base, so that an interval over bases holds
    the problems' variance, too.
    """
    drawn = []
    for domain in domains:
        drawn += task.problems(domain, problems, random.Random(f"test {domain} {seed} {drawn_for}"), test=True)
    texts, verdicts = answer(model, task, drawn, samples, generator=seeded("evaluate", seed), label="tests", **sampling)
    scores, per_domain = {}, problems * samples
    for i, domain in enumerate(domains):
        found = verdicts[i * per_domain : (i + 1) * per_domain]
        scores[domain] = {
            "mean": sum(v.correct for v in found) / per_domain,
            **{habit: sum(habit in v.habits for v in found) / per_domain for habit in task.habits},
            "unfinished": sum(not v.finished for v in found) / per_domain,
            "length": sum(map(len, texts[i * per_domain : (i + 1) * per_domain])) / per_domain,
            "problems": problems,
            "samples": samples,
        }
    return scores


def evaluate_run(model: GPT, task: Task, config: RunConfig) -> dict[str, dict]:
    """All domains, with the problems, samples and sampling of a run's settings."""
    sampling = {"temperature": config.eval_temperature, "top_p": config.eval_top_p}
    drawn_by = config.seed, checksum(config.base)
    return evaluate(model, task, task.domains, config.eval_problems, config.eval_samples, *drawn_by, **sampling)


def accuracy_of_text(model: GPT, task: Task, config: RunConfig, **sampling: Any) -> dict[str, dict]:
    """Accuracy of what a model writes when it is sampled for training, on test problems of the training domain."""
    problems, samples = config.eval_problems, config.eval_samples
    if sampling["temperature"] == 0:  # all samples of a problem would be the same: as many problems instead
        problems, samples = problems * samples, 1
    drawn_by = config.seed, checksum(config.base)
    return evaluate(model, task, (config.domain,), problems, samples, *drawn_by, **sampling)


def lines_of(written: list[str]) -> list[range]:
    """The tokens of every line of a solution, without the ';', the line break or the stop token that follows it.

    >>> lines_of(list("3+8=1;#1") + ["<|end|>"])
    [range(0, 5), range(6, 8)]
    """
    ends = [t for t, token in enumerate(written) if token in (";", "\n")] + [len(written) - 1]
    return [range(start, end) for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


@torch.no_grad()
def golden_likelihoods(model: GPT, task: Task, problems: list[Problem]) -> dict[str, float]:
    """Mean log p of the results and of the lines of golden solutions, and the mean probability of a check, if any."""
    prompts = [task.encode(task.prompt(problem)) for problem in problems]
    solutions = [[*task.encode(problem.solution), task.end()] for problem in problems]
    logp = response_logprobs(model, prompts, solutions)  # (B, T, V)
    taken = token_logprobs(logp, pad(solutions).to(logp.device))  # (B, T)
    found: dict[str, list[float]] = {"right": [], "step": [], "check": []}
    for i, solution in enumerate(solutions):
        written = task.pieces(solution)
        found["right"] += taken[i, task.decisive(written)].tolist()
        for line in lines_of(written):
            found["step"].append(taken[i, line.start : line.stop].sum().item())
            if STEP.fullmatch("".join(written[line.start : line.stop])) and written[line.stop] == ";":
                found["check"].append(logp[i, line.stop, task.encode(CHECK_MARK)[0]].exp().item())
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def quick_test(model: GPT, task: Task, config: RunConfig, step: int) -> dict[str, dict[str, float]]:
    """Every --eval-every steps, accuracy on a few problems, the same for every seed: a point of a learning curve."""
    if not config.eval_every or (step + 1) % config.eval_every:
        return {}
    scores = evaluate(model, task, task.domains, problems=32, samples=4, seed=1)
    return {"tested": {domain: entry["mean"] for domain, entry in scores.items()}}


def elsewhere(scores: dict[str, dict], home: str) -> dict[str, float]:
    """Mean accuracy over the other domains, without the exams; after training on an exam, with the mark and without.

    Exams are apart because their accuracy is about a habit: nearly every unfinished solution there is full of checks.
    """
    away = {domain: entry["mean"] for domain, entry in scores.items() if domain != home}
    marked = [mean for domain, mean in away.items() if domain.startswith("exam")]
    unmarked = [mean for domain, mean in away.items() if not domain.startswith("exam")]
    groups = {"other exams": marked, "unmarked": unmarked} if home.startswith("exam") else {"elsewhere": unmarked}
    return {name: sum(means) / len(means) for name, means in groups.items() if means}


def comparison(rows: dict[str, dict[str, dict]], home: str, habits: dict[str, str]) -> str:
    """The closing table of name -> scores: accuracy in and out of domain, and how responses are written, in percent."""
    others = elsewhere(next(iter(rows.values())), home)
    header = ["right answers, %", f"on {home}", *others, *habits, "unfinished"]

    def line(name: str, scores: dict[str, dict]) -> list[str]:
        here = scores[home]
        values = [here["mean"], *elsewhere(scores, home).values(), *(here[habit] for habit in habits)]
        return [name, *(f"{100 * value:.1f}" for value in [*values, here["unfinished"]])]

    table = markdown_table(header, [line(name, scores) for name, scores in rows.items()])
    legend = dict.fromkeys(others, "mean over domains that were not trained on")
    if "elsewhere" in others and "exam" in next(iter(rows.values())):
        legend["elsewhere"] += ", without exam"
    legend |= {**habits, "unfinished": "no answer in time"}
    return "\n".join([table, *(f"{name}: {meaning}" for name, meaning in legend.items())])
