"""Several runs at once, one process and one thread each, where that pays: on a CPU with a core for each of them.

A model this small gains little from a second thread, and two threads that wait for each other are slow on a busy
machine. Two processes wait for nothing.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from harness import parallel


def train_all(train: Callable[[Any], dict], configs: list[Any]) -> list[dict]:
    """`train` of every config, in their order; one after another under torchrun and on a GPU."""
    processes = min(len(configs), os.cpu_count() or 1)
    if processes == 1 or parallel.WORLD > 1 or parallel.pick_device(configs[0].device).type != "cpu":
        return [train(config) for config in configs]
    context, ignore_interrupts = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(processes, context, initializer=signal.signal, initargs=ignore_interrupts) as pool:
        try:
            return list(pool.map(train, configs))
        except BaseException:  # Ctrl-C as well: what each run has saved is complete
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def position() -> int:
    """The line of this process's progress bar."""
    name = multiprocessing.current_process().name  # of the pool's processes: SpawnProcess-1, ...
    return int(name.split("-")[-1]) - 1 if "-" in name else 0
