"""The hint audit on real weights: what does a hint do to a model that answers wrongly?

    python -m tools.real_audit --base FOLDER --task gym:chain_sum:max_digits=1 --shots 2 --problems 64

Takes the first wrong response to every problem that has one, and puts each kind of hint behind the problem. Measured:
P(reference answer) right after the answer mark; the same where the response first writes its own result, all before it
kept; whether a fresh greedy response is right. Where the task knows the first wrong step, that step's right result is
measured, by where in the response it stands, and what the response goes on to answer. Then the reflections: their form,
by the number of worked examples and by whether the prompt holds the answer. Writes results/real-audit.json, an entry a
task and domain; intervals are t over problems.
"""

import copy
import itertools
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.answers import MARK, MARKS, equal, falsify, final_answer
from data.sources import WordProblem
from data.steps import Steps
from data.words import Words
from data.working import Mistake
from errors import UserError
from harness import files
from harness.cli import markdown_table, option, parse_config, run_script
from harness.run import TaskConfig, open_task_and_base, provenance, seeded
from model import GPT, response_logprobs
from reflect import (
    Rollout,
    locate,
    pair_with_peers,
    parse_reflection,
    read_reflector,
    sample_rollouts,
    token_at,
    true_position,
)
from sampling import generate
from tools import stats

BATCH = 16  # sequences that are read at once
Case = tuple[Rollout, str]  # a wrong response, and the solution that its reflector reads
Written = tuple[Rollout, str]  # a wrong response, and the idea, or the whole text, of its reflection


@dataclass(frozen=True)
class Config(TaskConfig):
    task: str = option("gym:chain_sum:max_digits=1", "what the problems are from")
    domain: str = option("", "domain of the problems; unset: the task's first")
    problems: int = option(64, "problems of the training split", minimum=2)
    group: int = option(4, "samples a problem at temperature 1", minimum=1)
    reflector: str = option("base", "who reflects: the base, or a checkpoint (tools/teach_reflection.py makes one)")
    grid: int = option(16, "wrong responses on which the prompts for a reflection are compared", minimum=2)


@torch.no_grad()
def probability(model: GPT, task: Words, prompts: list[str], befores: list[str], answers: list[str]) -> list[float]:
    """P(answer, and no further digit | prompt, before) of each row."""
    responses = [[*task.encode(b + a), task.end()] for b, a in zip(befores, answers, strict=True)]
    digits, found, x = [task.encode(digit)[0] for digit in "0123456789"], [], list(map(task.encode, prompts))
    for i in range(0, len(x), BATCH):
        rows = response_logprobs(model, x[i : i + BATCH], responses[i : i + BATCH]).cpu()  # (B, T, V)
        for logp, y, before in zip(rows, responses[i:], befores[i:], strict=False):
            k, end = token_at(len(before), task.pieces(y)), len(y) - 1
            found.append((logp[range(k, end), y[k:end]].sum().exp() * (1 - logp[end, digits].exp().sum())).item())
    return found


def greedy(model: GPT, task: Words, length: int, prompts: list[str]) -> list[str]:
    written = generate(model, list(map(task.encode, prompts)), length, task.stop, temperature=0)
    return list(map(task.decode, written))


def true_idea(problem: WordProblem) -> str:
    """The last calculation of the reference solution, or else its result."""
    steps = [line for line in problem.solution.split("\n") if "=" in line]
    return steps[-1] if steps else f"The result is {problem.answer}."


def before_result(y: Rollout) -> str | None:
    """The response up to where it first writes the result that it ends with; None where it has none."""
    given = final_answer(y.text, y.problem.answer)
    if given is None or given not in y.text:
        return None
    match = re.search(rf"=\s*({re.escape(given)})(?!\d)", y.text)
    return y.text[: match.start(1) if match else y.text.rfind(given)]


def wrong_responses(model: GPT, task: Words, config: Config) -> tuple[list[Case], int, float]:
    """A wrong response to each problem that has one, the number of problems, and the share of right responses."""
    problems = task.problems(config.domain or task.domains[0], config.problems, random.Random(f"audit {config.seed}"))
    problems, rollouts = list({problem.question: problem for problem in problems}.values()), []
    at_once, draw = max(1, BATCH // config.group), seeded("audit", config.seed)
    for i in tqdm(range(0, len(problems), at_once), desc="rollouts"):
        rollouts += sample_rollouts(model, task, problems[i : i + at_once], config.group, draw)
    cases: dict[str, Case] = {}
    for y, peer, _ in pair_with_peers(rollouts, config.group):
        if not y.verdict.correct and (y.verdict.error if task.knows_first_error else before_result(y) is not None):
            cases.setdefault(y.problem.question, (y, peer.text if peer else y.problem.solution))
    return list(cases.values()), len(problems), sum(y.verdict.correct for y in rollouts) / len(rollouts)


def audit(model: GPT, task: Words, config: Config) -> dict:
    cases, count, right = wrong_responses(model, task, config)
    shares, shown, wrong, reflector = {}, [], [], read_reflector(config.reflector, model)
    ways = [*itertools.product(sorted({0, 1, task.reflect_shots}), (True, False))]
    for shots, answer in tqdm(ways, desc="reflections"):
        asker = copy.copy(task)
        asker.reflect_shots = shots
        in_training = (shots, answer) == (task.reflect_shots, False)  # the hint "its own reflection"
        chosen = cases if in_training else cases[: config.grid]
        prompts = [asker.reflector_prompt(y.problem, y.text, solution, answer) for y, solution in chosen]
        texts = greedy(reflector, task, task.max_reflection, prompts)
        written = [(y, text) for (y, _), text in zip(chosen, texts, strict=True)]
        way = f"{shots} examples" + ", with the answer" * answer
        shares[way] = form(written) | (truth(task, written) if task.knows_first_error else {})
        shown += [{"way": way, "attempt": y.text, "written": text} for y, text in written[:5]]
        if in_training:
            wrong = [(y, idea) for y, text in written if (idea := parse_reflection(text).idea)]
    figures = {"problems": count, "right": right, "wrong": len(cases), "with an idea": len(wrong)}
    if len(wrong) < 2:
        raise UserError(f"too few of {figures} for an audit; give more --problems or another --task")
    measure = step_hints if task.knows_first_error else hints
    found = measure(model, task, wrong, random.Random(config.seed))
    return {**figures, "hints": found, "reflections": shares, "shown": shown}


def hinted(task: Words, wrong: list[Written], true: list[str], false: list[str], what: str) -> dict[str, list[str]]:
    """hint -> prompts."""
    problems, written = [y.problem for y, _ in wrong], [idea for _, idea in wrong]
    return {
        "no hint": list(map(task.prompt, problems)),
        "an irrelevant hint": list(map(task.prompt, problems, written[1:] + written[:1])),
        "its own reflection": list(map(task.prompt, problems, written)),
        f"the true {what}": list(map(task.prompt, problems, true)),
        f"a wrong {what}": list(map(task.prompt, problems, false)),
        "a reference solution": [task.prompt(problem, solution=problem.solution) for problem in problems],
    }


def hints(model: GPT, task: Words, wrong: list[Written], rng: random.Random) -> dict:
    """hint -> measure -> [mean, half of its interval, mean and half of the paired difference from no hint]."""
    problems = [y.problem for y, _ in wrong]
    true = list(map(true_idea, problems))
    false = [falsify(idea, rng) for idea in true]
    prompts = hinted(task, wrong, true, false, "result")
    befores, answers, values = [before_result(y) for y, _ in wrong], [problem.answer for problem in problems], {}
    for hint, x in tqdm(prompts.items(), desc="hints"):
        responses = greedy(model, task, task.max_response, x)
        rows = {hint: answers}
        if hint == "a wrong result":
            rows["... and that wrong result"] = list(map(final_answer, false, answers))
        for row, results in rows.items():
            given = [final_answer(text, result) or "" for text, result in zip(responses, results, strict=True)]
            values[row] = {
                "P after the mark": probability(model, task, x, [f"{MARK} "] * len(x), results),
                "P in its own response": probability(model, task, x, befores, results),
                "greedy": list(map(float, map(equal, given, results))),
            }
    return compared(values)


def place(text: str, mistake: Mistake) -> str:
    """Where the first wrong step stands: no step before it, none behind it (the answer is no step), or between."""
    if "=" not in text[: mistake.start]:
        return "first"
    return "middle" if "=" in text[mistake.end :] else "last"


def before_answer(text: str, mistake: Mistake) -> str | None:
    """The response up to the answer that it gives behind a wrong step; None where there is none."""
    marks = [match.end() for match in MARKS.finditer(text, mistake.end)]
    return f"{text[: marks[-1]]} " if marks and final_answer(text, "1") else None


def step_hints(model: GPT, task: Steps, wrong: list[Written], rng: random.Random) -> dict:
    """As `hints`; P of the result of the right step, behind its left side and all before the wrong one."""
    mistakes = [task.mistake(y.problem, y.text) for y, _ in wrong]
    true, answers = [mistake.remedy for mistake in mistakes], [y.problem.answer for y, _ in wrong]
    prompts = hinted(task, wrong, true, [falsify(idea, rng) for idea in true], "step")
    lefts, results = map(list, zip(*(idea.rsplit(" ", 1) for idea in true), strict=True))
    befores = [f"{y.text[: m.start]}{left} " for (y, _), m, left in zip(wrong, mistakes, lefts, strict=True)]
    places = [place(y.text, m) for (y, _), m in zip(wrong, mistakes, strict=True)]
    ends = [(i, before_answer(y.text, m)) for i, ((y, _), m) in enumerate(zip(wrong, mistakes, strict=True))]
    ends = [(i, before) for i, before in ends if before]
    values = {}
    for hint, x in tqdm(prompts.items(), desc="hints"):
        P = probability(model, task, x, befores, results)
        found = {"P of the right result": P}
        for name in ("first", "middle", "last"):
            some = [p for p, at in zip(P, places, strict=True) if at == name]
            found |= {f"{name} ({len(some)})": some} if len(some) > 1 else {}
        if len(ends) > 1:
            rows, kept = map(list, zip(*ends, strict=True))
            own = [final_answer(wrong[i][0].text, "1") for i in rows]
            for name, result in (("right", [answers[i] for i in rows]), ("its own", own)):
                found[f"{name} answer behind it"] = probability(model, task, [x[i] for i in rows], kept, result)
        texts = greedy(model, task, task.max_response, x)
        given = [final_answer(text, answer) or "" for text, answer in zip(texts, answers, strict=True)]
        values[hint] = found | {"greedy": list(map(float, map(equal, given, answers)))}
    return compared(values)


def compared(values: dict[str, dict[str, list[float]]]) -> dict:
    none = values["no hint"]
    return {row: {name: interval(x) + interval(x, none[name]) for name, x in by.items()} for row, by in values.items()}


def truth(task: Steps, written: list[Written]) -> dict[str, list]:
    """Shares of the reflections that quote the first wrong step, and whose idea ends with its right result."""
    quotes, ideas = [], []
    for y, text in written:
        quote, idea = parse_reflection(text)
        span, result = locate(quote, y.pieces), task.mistake(y.problem, y.text).remedy.split()[-1]
        quotes.append(span is not None and span[0] == true_position(y))
        ideas.append(re.findall(r"-?\d+", idea or "")[-1:] == [result])
    return {"quote of the first error": interval(quotes), "idea with its right result": interval(ideas)}


def form(written: list[Written]) -> dict[str, list]:
    """Shares of the reflections with an idea, a quote, a quote that is found, an idea that names the answer."""
    read = [(y, *parse_reflection(text)) for y, text in written]
    shares = {
        "an idea": [idea is not None for _, _, idea in read],
        "a quote": [quote is not None for _, quote, _ in read],
        "quote found": [locate(quote, y.pieces) is not None for y, quote, _ in read],
        "idea names the answer": [y.problem.answer in re.findall(r"-?\w+", idea or "") for y, _, idea in read],
    }
    return {name: interval(share) for name, share in shares.items()}


def interval(values: list[float], reference: list[float] | None = None) -> list[float]:
    """Mean and half of the 95 % interval over problems."""
    found = stats.estimate(stats.by_unit(np.array(values, float) - (reference or 0)))
    return [found.mean, found.half]


def tables(found: dict) -> str:
    """The figures of one task as two tables; * marks a paired difference from no hint whose interval excludes 0."""

    def cell(mean: float, half: float, paired: float = 0, its_half: float = 0) -> str:
        return f"{mean:.2f} ± {half:.2f}" + " *" * (abs(paired) > its_half)

    blocks = {f"{found['with an idea']} wrong responses": "hints", "share of reflections with": "reflections"}
    tables = []
    for title, block in blocks.items():
        rows = [[name, *(cell(*values) for values in by.values())] for name, by in found[block].items()]
        tables.append(markdown_table([title, *next(iter(found[block].values()))], rows))
    return "\n\n".join(tables)


def main() -> None:
    config = parse_config(Config, __doc__)
    (task, model), path = open_task_and_base(config, config.domain), stats.RESULTS / "real-audit.json"
    began = time.time()
    if not isinstance(task, Words):
        raise UserError(f"{config.task} has its audit in pretrain.py --check-only; give another --task")
    about = {"config": files.plain(config) | {"base": Path(config.base).name}, **provenance(model)}
    found = audit(model, task, config)
    about |= {"base_checksum": files.checksum(config.base), "seconds": time.time() - began}
    others = files.read_json(path) if path.is_file() else {}
    name = f"{config.task} --domain {config.domain}" if config.domain else config.task
    name += " --reflector PATH" * (config.reflector != "base")
    files.write_json(path, others | {name: about | found})
    print(f"{found['right']:.0%} of the samples of {found['problems']} problems are right\n\n{tables(found)}")


if __name__ == "__main__":
    run_script(main)
