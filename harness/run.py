"""One training run: its folder, what it saves and resumes, the progress it shows, the results it leaves.

out/<run>/metrics.jsonl   a line per step
out/<run>/results.json    configuration, seed, versions, commit, accuracies, time, peak memory
out/<run>/model.pt        the trained model (a folder out/<run>/model if the base was a Hugging Face folder)
out/<run>/state.pt        everything --resume needs; gone when the run is finished
out/base-*.json           accuracies of the base, shared by all runs under out/ with the same settings
"""

import dataclasses
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import tiktoken
import torch
from tqdm import tqdm

from data import Task, load_task
from errors import UserError
from harness import files
from harness.cli import option
from model import GPT


@dataclass(frozen=True)
class TaskConfig:
    """the task and the base"""

    task: str = option("arithmetic", "what the problems are from: arithmetic, steps, gym:NAME[,NAME...] or FILE.jsonl")
    shots: int = option(0, "worked examples in the prompts of a task in words", minimum=0)
    max_response: int | None = option(None, "tokens of a response to a task in words; unset: the task's", minimum=1)
    base: str = option("data/base.pt", "checkpoint to start from, or the folder of a Hugging Face model")
    seed: int = option(0, "seed of everything random, test problems included", minimum=0, maximum=2**63 - 1)
    device: str = option("auto", "cpu, cuda, mps or auto")


@dataclass(frozen=True)
class RunConfig(TaskConfig):
    """the run"""

    domain: str = option("", "domain to train on; unset: the task's first")
    out: str = option("out", "folder for runs")
    resume: bool = option(False, "go on from the last checkpoint of the same command")
    baseline: bool = option(True, "also train what the method is compared with, for the table")
    eval_problems: int = option(64, "test problems a domain", minimum=1)
    eval_samples: int = option(16, "samples a test problem", "16", minimum=1)
    eval_temperature: float = option(1.0, "temperature of the tests", "0.6", minimum=0)
    eval_top_p: float = option(1.0, "truncation (top-p) of the tests", "0.95", minimum=0.01, maximum=1)
    eval_every: int = option(0, "steps between short tests, for learning curves; 0 tests never", minimum=0)


EVALUATION = ("eval_problems", "eval_samples", "eval_temperature", "eval_top_p")
# Settings that say where and how fast, not what: they may change when a run is resumed.
INCIDENTAL = ("out", "base", "resume", "device", "baseline")  # the base is compared by its content
SHOWN = ("loss", "accuracy", "quote_match")  # beside the progress bar


class Run:
    """A run's folder, claimed for this process; used as a context, so that others can claim it afterwards.

    reference is the config that the run's name is compared with: it holds the defaults of the same method.
    """

    def __init__(self, config: RunConfig, reference: RunConfig) -> None:
        self.task, self.base = open_task_and_base(config, config.domain)
        name = run_name(config, reference)
        self.config = config = dataclasses.replace(config, domain=config.domain or self.task.domains[0])
        self.label = config.method + (", …" if changed_settings(config, reference) else "")
        self.origin = {"base_checksum": files.checksum(config.base), "problems_checksum": self.task.problems_checksum}
        self.about = {"config": files.plain(config), **self.origin}
        self.folder = files.make_folder(Path(config.out) / name)
        self.history: list[dict] = []
        self.state: dict[str, Any] = {"seconds": 0.0}  # plain values, saved with the run
        self.parts: dict[str, Any] = {}  # models and optimizers, saved with the run
        self.results: dict[str, Any] = {}  # of the finished run, if --resume finds one
        if (path := self.folder / "results.json").exists():
            finished = files.read_json(path)
            self.check_same(finished, path)
            if config.resume and not (self.folder / "state.pt").exists():
                self.results = finished

    def __enter__(self) -> "Run":
        self.began, self.lock, path = time.time(), files.lock_folder(self.folder), self.folder / "state.pt"
        if not path.exists():
            if self.config.resume and not self.results:
                print(f"{self.folder} has nothing to resume: the run begins at its first step.", file=sys.stderr)
        elif not self.config.resume:
            print(f"{self.folder}: starts anew; --resume would have gone on where it stopped.", file=sys.stderr)
        else:
            self.saved = self.read_state(path)
            self.history, self.state = self.saved["history"], self.saved["state"]
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.close()

    def check_same(self, saved: dict, path: Path) -> None:
        """UserError where a file in this folder comes from other settings."""
        now = files.plain(self.config)
        try:  # a setting that is newer than the file had its default
            before = files.plain(type(self.config)()) | saved["config"]
            other = [name for name in now if name not in INCIDENTAL and before[name] != now[name]]
            other += [n.removesuffix("_checksum") for n, x in self.origin.items() if saved.get(n, "") != x]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged or of another version; remove it, or give another --out") from error
        if other:
            raise UserError(f"{path} comes from a run with another {', '.join(other)}; give another --out or remove it")

    # ------------------------------------------------------------------------------------------ state

    saved: dict[str, Any] | None = None

    def read_state(self, path: Path) -> dict[str, Any]:
        try:
            saved = torch.load(path, map_location=self.base.device, weights_only=True)
            self.check_same(saved, path)
            return {name: saved[name] for name in ("history", "state", "parts")}
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{path} is damaged; delete it and run again, from the start") from error

    def track(self, **parts: Any) -> None:
        """Name the models and optimizers that are saved with the run; with --resume, load them."""
        self.parts = {name: part for name, part in parts.items() if part is not None}
        if self.saved and self.saved["parts"]:
            try:
                for name, part in self.parts.items():
                    part.load_state_dict(self.saved["parts"][name])
            except (KeyError, ValueError, RuntimeError) as error:
                raise UserError(f"{self.folder / 'state.pt'} is damaged; delete it and run again") from error

    def save(self) -> None:
        """Write the state, then the metrics made from it: stopped in between, the resumed run loses nothing."""
        for name, part in self.parts.items():
            if isinstance(part, torch.nn.Module):
                files.check_finite(part, f"the {name}'s weights", "the state before is intact; lower --learning-rate")
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        state = self.state | {"seconds": self.seconds()}
        with files.replacing(self.folder / "state.pt") as temporary:
            torch.save({**self.about, "history": self.history, "state": state, "parts": parts}, temporary)
        files.write_lines(self.folder / "metrics.jsonl", self.history)

    def seconds(self) -> float:
        return self.state["seconds"] + time.time() - self.began

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` gives; a resumed run takes it from its state."""
        if name not in self.state:
            self.state[name] = measure()
            self.save()
        return self.state[name]

    def of_base(self, name: str, measure: Callable[[], Any], *settings: str) -> Any:
        """What `measure` says of the base; runs under --out with equal code and settings share it."""
        names = ("task", "shots", "max_response", "seed", *EVALUATION, *settings)
        key = [self.origin, files.code_checksum(), self.base.device.type, *(getattr(self.config, n) for n in names)]
        path = self.folder.parent / f"base-{name}-{zlib.crc32(repr(key).encode()):08x}.json"
        if not path.exists():
            files.write_json(path, measure())
        return files.read_json(path)

    def finish(self, model: GPT, **content: Any) -> dict[str, Any]:
        """Write the model and results.json; the state is not needed any more."""
        results = {"name": self.folder.name, **self.about, **provenance(self.base), "habits": dict(self.task.habits)}
        results |= {"seconds": self.seconds(), "peak_memory_mb": peak_memory_mb(), **content}
        if self.history and all(row["loss"] is None for row in self.history):
            print(f"{self.folder}: no step had anything to learn from, the model is the base.", file=sys.stderr)
        files.write_lines(self.folder / "metrics.jsonl", self.history)
        files.save_model(self.folder, model, self.config.base)
        files.write_json(self.folder / "results.json", results)
        (self.folder / "state.pt").unlink(missing_ok=True)
        return files.plain(results)

    # ------------------------------------------------------------------------------------------ randomness

    def random(self, name: str, *key: object) -> random.Random:
        return random.Random(" ".join(map(str, (name, self.config.seed, *key))))

    def generator(self, name: str, *key: object) -> torch.Generator:
        return seeded(name, self.config.seed, *key)

    # ------------------------------------------------------------------------------------------ progress

    def steps(self, count: int) -> Iterator[int]:
        """The steps still to be made, under a progress bar; the state is saved after each."""
        with progress_bar(range(len(self.history), count), self.label, len(self.history), count) as self.progress:
            for step in self.progress:
                yield step
                self.save()

    def log(self, **measures: Any) -> None:
        """Add a line to the metrics: lists are averaged, and left out where they are empty."""
        row: dict[str, Any] = {"step": len(self.history)}
        for name, value in measures.items():
            if not isinstance(value, list):
                row[name] = value
            elif value:
                row[name] = sum(value) / len(value)
        loss = row.get("loss")
        if loss is not None and not abs(loss) < float("inf"):
            raise UserError(
                f"the loss of step {row['step']} is {loss}; the state before is intact, lower --learning-rate"
            )
        self.history.append(row)
        if loss is None:
            self.progress.write(f"step {row['step']}: nothing to learn from, no update", file=sys.stderr)
        self.progress.set_postfix_str(", ".join(f"{n} {row[n]:.2g}" for n in SHOWN if row.get(n) is not None))


def progress_bar(items: Any, label: str, initial: int = 0, total: int | None = None) -> tqdm:
    """A bar that fits in 80 columns; the bars of trainings side by side stand below one another."""
    position = int(multiprocessing.current_process().name.partition("training-")[2] or 0)  # see train_side_by_side
    form = "{desc}: {percentage:3.0f}%|{bar:8}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {postfix}"
    return tqdm(items, desc=label, initial=initial, total=total, position=position, bar_format=form)


def seeded(*key: object) -> torch.Generator:
    """A CPU generator seeded by a key like ("rollout", seed, step): no random state has to be saved."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


# ---------------------------------------------------------------------------------------------- names


def changed_settings(config: RunConfig, reference: RunConfig) -> list[str]:
    """E.g. ['control false-ideas', 'dose 0.5']: every setting that is not the method's own, but for test sizes."""
    no_flag = {"method", "domain", "seed", "eval_problems", "eval_samples", *INCIDENTAL}
    changed = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in no_flag and value != getattr(reference, field.name):
            changed.append(f"{field.name} {'+'.join(map(str, value)) if isinstance(value, tuple) else value}")
    if getattr(config, "preset", "paper") != "paper":
        changed.append(f"preset {config.preset}")
    return changed


def run_name(config: RunConfig, reference: RunConfig) -> str:
    """E.g. 'rosd-mask=whole-add-seed0': method, changed settings, base, domain, seed; without loss of information."""
    flags = [text.replace(" ", "=", 1) for text in changed_settings(config, reference)]
    base = files.checksum(config.base)
    if not files.BASE_CHECKPOINT.is_file() or base != files.checksum(files.BASE_CHECKPOINT):
        flags.append(f"base={Path(config.base).name.removesuffix('.pt')}.{base}")
    domain = [config.domain] if config.domain and config.domain != reference.domain else []
    exact = "-".join([config.method, *flags, *domain, f"seed{config.seed}"])
    name = "".join(c if c.isalnum() or c in "+.-=_" else "_" for c in exact)
    if name == exact and len(name) < 200:
        return name
    return f"{name[:180]}-{zlib.crc32(exact.encode()):08x}"  # file systems allow 255


# ---------------------------------------------------------------------------------------------- task, base, device


def find_task(config: TaskConfig, *domains: str) -> Task:
    """The task that a config names; UserError where there is none, or where it lacks one of the domains; '' is any."""
    task = load_task(config.task, config.base, config.shots, config.max_response)
    for domain in domains:
        if domain not in ("", *task.domains):
            raise UserError(f"{config.task} has no domain {domain!r}; give one of {', '.join(task.domains)}")
    return task


def open_task_and_base(config: TaskConfig, *domains: str) -> tuple[Task, GPT]:
    """The task, and the base, frozen, on its device; UserError where they do not match."""
    use_threads(config)
    task, device = find_task(config, *domains), pick_device(config.device)
    model = files.load_checkpoint(config.base, device)
    has, needed = model.config.vocab_size, task.vocab_size
    if has < needed or (has > needed and not task.spare_rows):
        sizes = f"{has} tokens, the task one of {needed}"
        raise UserError(f"{config.base} has a vocabulary of {sizes}; give the --task or the --base that belongs to it")
    return task, model.to(device).requires_grad_(False).eval()


def use_threads(config: TaskConfig) -> None:
    """As many CPU threads as OMP_NUM_THREADS says. By default one, or the cores for a Hugging Face model.

    A model as small as data/base.pt gains nothing from a second thread. Trainings side by side share the cores.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS", 0))
    beside = int(os.environ.get("TRAININGS", 1))
    torch.set_num_threads(threads or (max(1, (os.cpu_count() or 1) // beside) if Path(config.base).is_dir() else 1))


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


# ---------------------------------------------------------------------------------------------- trainings side by side


def train_all(train: Callable[[Any], dict], configs: list[Any]) -> list[dict]:
    """`train` of every config -> results in the same order; on a CPU in a process for each, as many as it has cores."""
    cores = os.cpu_count() or 1
    if len(configs) == 1 or cores == 1 or pick_device(configs[0].device).type != "cpu":
        return [train(config) for config in configs]
    results: list[dict] = []
    for start in range(0, len(configs), cores):
        results += train_side_by_side(train, configs[start : start + cores])
    return results


def train_side_by_side(train: Callable[[Any], dict], configs: list[Any]) -> list[dict]:
    """The first config in this process, each other one in a process of its own."""
    os.environ["TRAININGS"] = str(len(configs))
    context, children = multiprocessing.get_context("spawn"), []
    try:
        for i, config in enumerate(configs[1:], start=1):
            receiving, sending = context.Pipe(duplex=False)
            child = context.Process(target=train_in_child, args=(train, config, sending), name=f"training-{i}")
            child.start()
            sending.close()
            children.append((child, receiving))
        return [train(configs[0]), *(result_of(receiving) for _, receiving in children)]
    finally:  # after an error or Ctrl-C as well: what each run has saved is complete
        for child, _ in children:
            child.kill()
            child.join()


def train_in_child(train: Callable[[Any], dict], config: Any, sending: Any) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # however the parent ends, this process ends as well

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


# ---------------------------------------------------------------------------------------------- provenance


def provenance(base: GPT) -> dict[str, Any]:
    """Versions, commit, number format and threads, for every results file."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(files.ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        if git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.pt"):
            commit += "+changes"
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {"torch": torch.__version__, "numpy": numpy.__version__, "tiktoken": tiktoken.__version__}
    computed = {"dtype": str(base.embed.weight.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    return {"commit": commit, "python": platform.python_version(), **versions, **computed, "device": base.device.type}


def peak_memory_mb() -> float | None:
    """The largest memory of this process so far, in MB of 2**20 bytes: the GPU's, or else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
