"""Several processes or GPUs: `torchrun --standalone --nproc_per_node=N train_rosd.py`, with torch.distributed alone.

Every process holds the whole model, takes its share of the prompts, and divides its loss by the token count of *all*
processes. The sum of their gradients is then the gradient of one process with the whole batch. Without torchrun
`share` and `gather` return what they are given, `total` a detached copy, and `sum_gradients` does nothing.

`train_all` runs several trainings side by side.
"""

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from errors import UserError

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
FIRST = RANK == 0  # the one process that writes files and shows progress


def pick_device(name: str = "auto") -> torch.device:
    """'auto' takes CUDA where it has a GPU for every process, then MPS, which serves one process, then the CPU."""
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= LOCAL_WORLD
    if name == "auto":
        name = "cuda" if enough else "mps" if torch.backends.mps.is_available() and WORLD == 1 else "cpu"
    try:
        device = torch.zeros(1, device=name).device
        if device.type not in ("cpu", "cuda", "mps"):
            raise NotImplementedError
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here; give --device auto, cpu, cuda or mps") from error
    if WORLD > 1 and (device.type == "mps" or (device.type == "cuda" and not enough)):
        raise UserError(f"{LOCAL_WORLD} processes cannot share device {name!r}; start fewer, or give --device cpu")
    return device


def start(name: str = "auto") -> torch.device:
    """Pick the device and join the other processes: each has its own GPU, or all share the CPU."""
    keep_freed_memory()
    device = pick_device(name)
    if WORLD > 1 and device.type == "cuda":
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks for the next tensors: fetching fresh pages takes a twentieth of a run on a CPU."""
    with suppress(OSError, AttributeError):  # other C libraries have other ways
        for parameter, value in ((-1, 1 << 30), (-3, 1 << 25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL("libc.so.6").mallopt(parameter, value)


def share(items: list) -> list:
    """This process's part of a list that all of them have."""
    return items[RANK::WORLD]


def total(value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes; no gradient flows through it."""
    value = value.detach().clone()
    if WORLD > 1:
        dist.all_reduce(value)
    return value


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add up every process's gradients, in one message; those of a process that had nothing to learn from are 0."""
    if WORLD > 1:
        parameters = list(parameters)
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        dist.all_reduce(flat)
        for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = grad.view_as(parameter)


def gather(items: list) -> list:
    """The lists of all processes, one after another, in every process."""
    if WORLD == 1:
        return items
    parts: list[Any] = [None] * WORLD
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def train_all(train: Callable[[Any], dict], configs: list[Any]) -> list[dict]:
    """`train` of every config -> results in the same order; on a CPU as many at a time as it has cores.

    A model this small gains little from a second thread, and two threads that wait for each other are slow on a busy
    machine. Two processes wait for nothing.
    """
    others = min(len(configs), os.cpu_count() or 1) - 1
    if others == 0 or WORLD > 1 or pick_device(configs[0].device).type != "cpu":
        return [train(config) for config in configs]
    with ProcessPoolExecutor(others, multiprocessing.get_context("spawn"), initializer=end_with_the_parent) as pool:
        try:
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the children inherit
            beside = pool.map(train, configs[1:])
            signal.signal(signal.SIGINT, before)
            return [train(configs[0]), *beside]
        except BaseException:  # Ctrl-C as well: what each run has saved is complete
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def end_with_the_parent() -> None:
    """However the parent ends, this process ends, too."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def bar_position() -> int:
    """The line of this process's progress bar: 0, and 1, 2, ... for those that `train_all` started."""
    return int(multiprocessing.current_process().name.partition("-")[2] or 0)  # SpawnProcess-1, ...
