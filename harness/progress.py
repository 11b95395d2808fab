"""Progress bars that fit in 80 columns, also where several trainings run side by side (see harness/device.py)."""

import multiprocessing
import os
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

FORM = "{desc} {percentage:3.0f}%|{bar:8}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"


def trainings() -> int:
    """How many trainings run side by side."""
    return int(os.environ.get("TRAININGS", 1))


def training_number() -> int:
    """Which of them this process is: 0 for the first, which the user started."""
    return int(multiprocessing.current_process().name.partition("training-")[2] or 0)


def progress_bar(items: Iterable, label: str, initial: int = 0, total: int | None = None, **settings: Any) -> tqdm:
    """The bar of a run; bars of trainings side by side stand below one another and disappear at their end."""
    settings = {"position": training_number(), "leave": trainings() == 1, "bar_format": FORM} | settings
    return tqdm(items, desc=label, initial=initial, total=total, **settings)


def inner_bar(items: Iterable, label: str) -> tqdm:
    """The bar of one long operation: below the bars of the runs, from its third second on, and only until its end."""
    return progress_bar(items, f"  {label}", position=trainings() + training_number(), leave=False, delay=3)
