"""What a machine has: devices, threads and memory, and several trainings side by side on its cores."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from errors import UserError
from harness.progress import trainings


def pick_device(name: str = "auto") -> torch.device:
    """The device of this name; 'auto' takes CUDA, then MPS, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
        if device.type not in ("cpu", "cuda", "mps"):
            raise NotImplementedError
        return device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here; give --device auto, cpu, cuda or mps") from error


def slow_in_bfloat16(device: torch.device | str) -> bool:
    """Whether a device lacks bfloat16 units, as most CPUs of laptops do: float32 is several times as fast there."""
    if torch.device(device).type != "cpu":
        return False
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def use_threads(base: str = "") -> None:
    """Use as many CPU threads as OMP_NUM_THREADS says; by default one, or all cores for a Hugging Face folder.

    A model as small as data/base.pt gains nothing from a second thread. Trainings side by side share the cores.
    """
    cores = max(1, (os.cpu_count() or 1) // trainings()) if Path(base or ".pt").is_dir() else 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(int(wanted) if wanted.isdecimal() and int(wanted) else cores)


def peak_memory_mb() -> float | None:
    """The largest memory of this process until now, in MB of 2**20 bytes: the GPU's if it used one, or the RAM."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---------------------------------------------------------------------------------------------- trainings side by side


def train_all(train: Callable[[Any], dict], configs: list[Any]) -> list[dict]:
    """`train` of every config -> results in the same order; on a CPU as many at a time as it has cores."""
    together = (os.cpu_count() or 1) if pick_device(configs[0].device).type == "cpu" else 1
    parts = [configs[start : start + together] for start in range(0, len(configs), together)]
    return [result for part in parts for result in train_side_by_side(train, part)]


def train_side_by_side(train: Callable[[Any], dict], configs: list[Any]) -> list[dict]:
    """Train the first config in this process, and each other one in a process of its own."""
    os.environ["TRAININGS"] = str(len(configs))
    context, children = multiprocessing.get_context("spawn"), []
    try:
        for number, config in enumerate(configs[1:], start=1):
            receiving, sending = context.Pipe(duplex=False)
            child = context.Process(target=train_in_child, args=(train, config, sending), name=f"training-{number}")
            interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: only this process heeds Ctrl-C
            child.start()
            signal.signal(signal.SIGINT, interrupt)
            sending.close()
            children.append((child, receiving))
        results = [train(configs[0]), *(result_of(receiving) for _, receiving in children)]
        for child, _ in children:
            child.join(5)  # killed while it ends, it would leave a warning about its semaphores
        return results
    finally:  # also after an error or Ctrl-C: what each run has saved is complete
        for child, _ in children:
            child.kill()
            child.join()
        del os.environ["TRAININGS"]


def train_in_child(train: Callable[[Any], dict], config: Any, sending: Any) -> None:
    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # however the parent ends, this process ends with it

    threading.Thread(target=watch, daemon=True).start()
    try:
        sending.send(train(config))
    except UserError as error:
        sending.send(error)


def result_of(receiving: Any) -> dict:
    try:
        result = receiving.recv()
    except EOFError as error:
        raise UserError("a training beside this one ended without a result; its own output says why") from error
    if isinstance(result, UserError):
        raise result
    return result
