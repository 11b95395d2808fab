"""What a teacher becomes when it follows its student: how likely it checks a step, before and after the hinted one.

    python -m tools.habits     measures the bases and the models of `python -m tools.study collapse`, fills in the table

Teacher-forced on golden solutions of test problems of `mix`; the idea is such a solution up to one of its later steps.
The models are read from out/studies/collapse, and so results/habits.json needs that study to have run on this machine.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data import Task, load_task
from data.chains import CHECK_MARK
from errors import UserError
from harness import files
from harness.cli import markdown_table, option, parse_config, run_script
from model import GPT, response_logprobs
from tools import stats
from tools.studies import STUDIES
from tools.study import base_path, command_of, plan

PROBLEMS = 200  # golden solutions
WHERE = ("without a hint", "before the hinted step", "after it")


@dataclass(frozen=True)
class Config:
    out: str = option("out/studies", "folder of the studies' runs")


@torch.no_grad()
def check_probabilities(model: GPT, task: Task, problems: int) -> dict[str, float]:
    """Mean probability of a check behind a step's result, at each of WHERE. The hint is the solution up to a step."""
    rng, found = random.Random("habits"), {where: [] for where in WHERE}
    check = task.encode(CHECK_MARK)[0]
    for problem in task.problems("mix", problems, rng, test=True):
        steps, response = problem.solution.split(";"), task.encode(problem.solution)
        hinted = rng.randrange(1, len(steps) - 1)  # the last piece is the answer
        prompts = [task.prompt(problem), task.prompt(problem, idea=";".join(steps[: hinted + 1]))]
        chances = response_logprobs(model, list(map(task.encode, prompts)), [response] * 2)[:, :, check].exp()  # (2, T)
        behind = [t for t, token in enumerate(task.pieces(response)) if token == ";"]  # the result of every step
        found[WHERE[0]] += chances[0, behind].tolist()
        found[WHERE[1]] += chances[1, behind[:hinted]].tolist()
        found[WHERE[2]] += chances[1, behind[hinted:]].tolist()
    return {where: sum(values) / len(values) for where, values in found.items()}


def measured(config: Config, task: Task) -> Iterator[dict]:
    """A row for every base and every finished run of the study."""
    study, out = STUDIES["collapse"], Path(config.out).resolve() / "collapse"
    models = [("base", base, Path(base_path(base))) for base in study.bases]
    models += [(job.variant, job.base, command_of(job, out)[1] / "model.pt") for job in plan(study)]
    for variant, base, path in models:
        if variant != "base" and not path.exists():
            raise UserError(f"there is no {path}; run `python -m tools.study collapse` first")
        model = files.load_checkpoint(path).eval()
        yield {"variant": variant, "base": base} | check_probabilities(model, task, PROBLEMS)


def table(rows: list[dict]) -> str:
    lines = []
    for variant, found in stats.by_variant({"runs": rows}).items():
        percent = [stats.estimate({(row["base"], 0): 100 * row[where] for row in found}) for where in WHERE]
        lines.append([variant, *(f"{each:.0f}" for each in percent)])
    return markdown_table(["P(check), %", *WHERE], lines)


def main() -> None:
    config = parse_config(Config, __doc__)
    torch.set_num_threads(1)
    rows = list(measured(config, load_task("arithmetic")))
    short = [{name: round(x, 4) if isinstance(x, float) else x for name, x in row.items()} for row in rows]
    files.write_json(stats.RESULTS / "habits.json", {"problems": PROBLEMS, "rows": short})
    stats.publish("habits", table(short))


if __name__ == "__main__":
    run_script(main)
