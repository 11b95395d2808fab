"""Tasks: `task.py` says what one is, `arithmetic.py` is the synthetic one that everything runs on by default.

`words.py` is the task of real language models: problems of Reasoning Gym, or of a file (`sources.py`). `steps.py` is
one of them whose verifier knows the first wrong step.
"""

from pathlib import Path

from data.answers import falsify
from data.arithmetic import Arithmetic, Exams, Facts
from data.sources import Gym, Lines
from data.steps import Steps, Sums
from data.task import Problem, Task, Verdict
from data.words import Words
from errors import UserError

__all__ = ["Problem", "Task", "Verdict", "falsify", "load_task"]

ARITHMETIC = {"arithmetic": Arithmetic, "facts": Facts, "exams": Exams}


def load_task(
    spec: str, base: Path | str = "data/base.pt", shots: int = 0, max_response: int | None = None,
    reflect_shots: int | None = None,
) -> Task:  # fmt: skip
    """The task that `--task` names, in the tokens of the base; the other settings are for tasks in words alone."""
    settings = base, shots, max_response, reflect_shots
    if spec in ARITHMETIC:
        if shots or max_response or reflect_shots:
            flags = "--shots, --max-response and --reflect-shots"
            raise UserError(f"the task {spec} takes none of {flags}; leave them out")
        return ARITHMETIC[spec]()
    if spec.startswith("gym:"):
        return Words(Gym(spec.removeprefix("gym:")), *settings)
    if spec.partition(":")[0] == "steps":
        return Steps(Sums(spec), *settings)
    if spec.endswith(".jsonl"):
        return Words(Lines(spec), *settings)
    raise UserError(
        f"there is no task {spec!r}; give {', '.join(ARITHMETIC)}, steps, gym:NAME of Reasoning Gym, or a FILE.jsonl"
    )
