"""Tasks: `task.py` says what one is, `arithmetic.py` is the synthetic one that everything runs on by default."""

from data.task import Problem, Task, Verdict

__all__ = ["Problem", "Task", "Verdict", "load_task"]


def load_task(name: str) -> Task:
    """The task that `--task` names; ValueError says which there are."""
    if name == "arithmetic":
        from data.arithmetic import Arithmetic

        return Arithmetic()
    raise ValueError(f"there is no task {name!r}; give --task arithmetic")
