"""The hint audit on real weights: what does a hint do to a model that answers wrongly?

    python -m tools.real_audit --base FOLDER --task gym:chain_sum:max_digits=1 --shots 2 --problems 64

Takes the first wrong response to every problem that has one, and puts each kind of hint behind the problem. Measured:
P(reference answer) right after the answer mark; the same where the response first writes its own result, all before it
kept; whether a fresh greedy response is right. Then the reflections: their form, by the worked examples shown first and
by whether the answer was told. Writes results/real-audit.json, an entry a task; intervals are t over problems.
"""

import copy
import itertools
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from data.answers import MARK, equal, falsify, final_answer
from data.sources import WordProblem
from data.words import Words
from errors import UserError
from harness import files
from harness.cli import markdown_table, option, parse_config, run_script
from harness.run import TaskConfig, open_task_and_base, provenance, seeded
from model import GPT, generate, response_logprobs
from reflect import Rollout, choose_peers, locate, parse_reflection, sample_rollouts, token_at
from tools import stats


@dataclass(frozen=True)
class Config(TaskConfig):
    task: str = option("gym:chain_sum:max_digits=1", "what the problems are from; its first domain is taken")
    problems: int = option(64, "problems that are asked, of the training split", minimum=2)
    group: int = option(4, "samples a problem at temperature 1", minimum=1)
    grid: int = option(16, "wrong responses on which the ways to ask for a reflection are compared", minimum=2)
    batch: int = option(16, "sequences in memory at once", minimum=1)


def in_batches(function: Callable[..., list], what: str, size: int, *columns: list) -> list:
    """function of rows of similar length, a batch at a time under a progress bar -> its results in the rows' order."""
    order, results = sorted(range(len(columns[0])), key=lambda i: len(columns[0][i])), {}
    for start in tqdm(range(0, len(order), size), desc=what, dynamic_ncols=True):
        chosen = order[start : start + size]
        results |= zip(chosen, function(*([column[i] for i in chosen] for column in columns)), strict=True)
    return [results[i] for i in range(len(order))]


@torch.no_grad()
def probability(model: GPT, task: Words, prompts: list[str], befores: list[str], answers: list[str]) -> list[float]:
    """P(answer, and no further digit | prompt, before) of each row."""
    responses = [[*task.encode(b + a), task.end()] for b, a in zip(befores, answers, strict=True)]
    logp = response_logprobs(model, list(map(task.encode, prompts)), responses).cpu()  # (B, T, V)
    digits, found = [task.encode(digit)[0] for digit in "0123456789"], []
    for p, tokens, before in zip(logp, responses, befores, strict=True):
        k, end = token_at(len(before), task.pieces(tokens)), len(tokens) - 1
        found.append((p[range(k, end), tokens[k:end]].sum().exp() * (1 - p[end, digits].exp().sum())).item())
    return found


def greedy(model: GPT, task: Words, length: int, prompts: list[str]) -> list[str]:
    written = generate(model, list(map(task.encode, prompts)), length, task.stop, temperature=0)
    return list(map(task.decode, written))


def true_idea(problem: WordProblem) -> str:
    """The last calculation of the reference solution, or else its result."""
    steps = [line for line in problem.solution.split("\n") if "=" in line]
    return steps[-1] if steps else f"The result is {problem.answer}."


def first_result(rollout: Rollout) -> str | None:
    """The response up to where it first writes the result that it ends with; None where it has none."""
    given = final_answer(rollout.text, rollout.problem.answer)
    if given is None or given not in rollout.text:
        return None
    match = re.search(rf"=\s*({re.escape(given)})(?!\d)", rollout.text)
    return rollout.text[: match.start(1) if match else rollout.text.rfind(given)]


def wrong_responses(model: GPT, task: Words, config: Config) -> tuple[dict, int, float]:
    """(wrong response, solution shown beside it) by question; the number of problems; the share of right responses."""
    problems = task.problems(task.domains[0], config.problems, random.Random(f"audit {config.seed}"))
    problems, rollouts = list({problem.question: problem for problem in problems}.values()), []
    at_once, draw = max(1, config.batch // config.group), seeded("audit", config.seed)
    for i in tqdm(range(0, len(problems), at_once), desc="rollouts", dynamic_ncols=True):
        rollouts += sample_rollouts(model, task, problems[i : i + at_once], config.group, draw)
    cases = {}
    for rollout, peer in zip(rollouts, choose_peers(rollouts, config.group), strict=True):
        if not rollout.verdict.correct and first_result(rollout) is not None:
            cases.setdefault(rollout.problem.question, (rollout, peer.text if peer else rollout.problem.solution))
    return cases, len(problems), sum(rollout.verdict.correct for rollout in rollouts) / len(rollouts)


def audit(model: GPT, task: Words, config: Config) -> dict:
    cases, count, right = wrong_responses(model, task, config)
    forms, shown, ideas = {}, [], []
    for shots, told in itertools.product(sorted({0, 1, config.shots}), (True, False)):
        asker = copy.copy(task)
        asker.shots = shots
        own = (shots, told) == (config.shots, False)  # as in training: the hint "its own reflection"
        asked = list(cases.values())[: None if own else config.grid]
        prompts = [asker.reflector_prompt(rollout.problem, rollout.text, peer, told) for rollout, peer in asked]
        way = f"{shots} examples, {'told' if told else 'not told'}"
        texts = in_batches(partial(greedy, model, task, task.max_reflection), way, config.batch, prompts)
        forms[way] = form(task, [rollout for rollout, _ in asked], texts)
        shown += [
            {"way": way, "attempt": r.text, "written": text}
            for (r, _), text in list(zip(asked, texts, strict=True))[:5]
        ]
        ideas = [parse_reflection(text).idea for text in texts] if own else ideas
    wrong = [(rollout, idea) for (rollout, _), idea in zip(cases.values(), ideas, strict=True) if idea]
    figures = {"problems": count, "right": right, "wrong": len(cases), "with an idea": len(wrong)}
    if len(wrong) < 2:
        raise UserError(f"too few of {figures} for an audit; give more --problems or another --task")
    return {**figures, "hints": hints(model, task, wrong, config), "reflections": forms, "shown": shown}


def hints(model: GPT, task: Words, wrong: list[tuple[Rollout, str]], config: Config) -> dict:
    """hint -> measure -> [mean, half of its interval, mean and half of the paired difference from no hint]."""
    asked, own, rng = [r.problem for r, _ in wrong], [idea for _, idea in wrong], random.Random(config.seed)
    true = list(map(true_idea, asked))
    false = [falsify(idea, rng) for idea in true]
    prompts = {
        "no hint": list(map(task.student_prompt, asked)),
        "an irrelevant hint": list(map(task.teacher_prompt, asked, own[1:] + own[:1])),
        "its own reflection": list(map(task.teacher_prompt, asked, own)),
        "the true result": list(map(task.teacher_prompt, asked, true)),
        "a wrong result": list(map(task.teacher_prompt, asked, false)),
        "a reference solution": [task.teacher_prompt(problem, solution=problem.solution) for problem in asked],
    }
    befores, answers, values = [first_result(r) for r, _ in wrong], [problem.answer for problem in asked], {}
    chance, marks = partial(probability, model, task), [f"{MARK} "] * len(wrong)
    for hint, held in prompts.items():
        written = in_batches(partial(greedy, model, task, task.max_response), hint, config.batch, held)
        rows = {hint: answers}
        rows |= (
            {"... and that wrong result": list(map(final_answer, false, answers))} if hint == "a wrong result" else {}
        )
        for row, results in rows.items():
            given = [final_answer(text, result) or "" for text, result in zip(written, results, strict=True)]
            values[row] = {
                "P after the mark": in_batches(chance, row, config.batch, held, marks, results),
                "P in its own response": in_batches(chance, row, config.batch, held, befores, results),
                "greedy": list(map(float, map(equal, given, results))),
            }
    none = values["no hint"]
    return {row: {name: interval(x) + interval(x, none[name]) for name, x in by.items()} for row, by in values.items()}


def form(task: Words, wrong: list[Rollout], texts: list[str]) -> dict[str, list]:
    """Shares of the reflections with an idea, a quote, a quote that is found, an idea that names the answer."""
    shares = {"an idea": [], "a quote": [], "quote found": [], "idea names the answer": []}
    for rollout, read in zip(wrong, map(parse_reflection, texts), strict=True):
        numbers = re.findall(r"-?\w+", read.idea or "")
        found = locate(read.quote, task.pieces(rollout.tokens)) is not None
        facts = (read.idea is not None, read.quote is not None, found, rollout.problem.answer in numbers)
        for share, fact in zip(shares.values(), facts, strict=True):
            share.append(float(fact))
    return {name: interval(share) for name, share in shares.items()}


def interval(values: list[float], reference: list[float] | None = None) -> list[float]:
    """Mean and half of the 95 % interval over problems."""
    found = stats.estimate({(i, 0): x - (reference[i] if reference else 0) for i, x in enumerate(values)})
    return [found.mean, found.half]


def tables(found: dict) -> str:
    """The figures of one task as two tables; * marks a paired difference from no hint whose interval excludes 0."""
    blocks = []
    for title, rows in ((f"{found['with an idea']} wrong responses", found["hints"]), ("", found["reflections"])):
        header = [title or "share of reflections with", *next(iter(rows.values()))]
        cells = [
            [f"{x:.2f} ± {half:.2f}" + " *" * (abs(sum(d[:1])) > sum(d[1:])) for x, half, *d in by.values()]
            for by in rows.values()
        ]
        blocks.append(markdown_table(header, [[name, *row] for name, row in zip(rows, cells, strict=True)]))
    return "\n\n".join(blocks)


def main() -> None:
    config = parse_config(Config, __doc__)
    (task, model), path, began = open_task_and_base(config), stats.RESULTS / "real-audit.json", time.time()
    if not isinstance(task, Words):
        raise UserError(f"{config.task} has its audit in pretrain.py --check-only; give another --task")
    about = {"config": files.plain(config) | {"base": Path(config.base).name}, **provenance()}
    about["base_checksum"] = files.checksum(config.base)
    found = audit(model, task, config)
    others = files.read_json(path) if path.is_file() else {}
    files.write_json(path, others | {config.task: {**about, "seconds": time.time() - began, **found}})
    print(
        f"{found['right']:.0%} of {config.group} samples of {found['problems']} problems are right\n\n{tables(found)}"
    )


if __name__ == "__main__":
    run_script(main)
