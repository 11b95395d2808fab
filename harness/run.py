"""One training run: its folder, what it saves and resumes, the progress it shows, the results it leaves.

out/<run>/metrics.jsonl   a line per step
out/<run>/results.json    configuration, seed, versions, commit, accuracies, time, peak memory
out/<run>/model.pt        the trained model (a folder out/<run>/model if the base was a Hugging Face folder)
out/<run>/state.pt        everything --resume needs; gone when the run is finished
out/base-*.json           accuracies of the base, shared by all runs under out/ with the same settings
"""

import dataclasses
import random
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data import Task, load_task
from errors import UserError
from harness import files
from harness.cli import DECIDES_DEFAULTS, check_values, option
from harness.device import peak_memory_mb, pick_device, use_threads
from harness.files import provenance
from harness.progress import progress_bar
from model import GPT


@dataclass(frozen=True)
class TaskConfig:
    """the task and the base"""

    task: str = option("arithmetic", "the problems: arithmetic, exams, facts, steps, gym:NAME[,NAME] or FILE.jsonl")
    shots: int = option(0, "worked examples in the prompts of a task in words", minimum=0)
    reflect_shots: int | None = option(None, "worked reflections in the reflector's prompt; unset: --shots", minimum=0)
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
    eval_problems: int = option(512, "test problems a domain; every base and seed has its own", minimum=1)
    eval_samples: int = option(2, "samples a test problem", "16", minimum=1)
    eval_temperature: float = option(1.0, "temperature of the tests; released code: 0.6", minimum=1e-3, or_zero=True)
    eval_top_p: float = option(1.0, "truncation of the tests (top-p); released code: 0.95", minimum=0.01, maximum=1)
    eval_every: int = option(0, "steps between short tests, for learning curves; 0: never", minimum=0)


EVALUATION = ("eval_problems", "eval_samples", "eval_temperature", "eval_top_p")
# Settings that say where and how fast, not what: they may change when a run is resumed.
INCIDENTAL = ("out", "base", "resume", "device", "baseline")  # the base is compared by its content
SHOWN = ("loss", "accuracy")  # beside the progress bar


class Run:
    """A run's folder, claimed for this process; used as a context, so that others can claim it afterwards.

    reference is the config that the run's name is compared with: it holds the defaults of the same method.
    """

    def __init__(self, config: RunConfig, reference: RunConfig) -> None:
        check_values(config)
        domains = config.domain, *getattr(config, "calibration_domain", ())
        self.task, self.base = open_task_and_base(config, *domains)
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
        for unfinished in self.folder.glob("*.tmp"):  # of a process that was killed while it wrote
            unfinished.unlink(missing_ok=True)
        if path.exists() and self.config.resume:
            self.saved = self.read_state(path)
            self.history, self.state = self.saved["history"], self.saved["state"]
        elif path.exists():
            print(f"{self.folder}: starts anew; --resume would have gone on where it stopped.", file=sys.stderr)
        elif self.config.resume and not self.results:
            others = sorted(p.parent.name for p in self.folder.parent.glob(f"{self.config.method}-*/state.pt"))
            hint = f"; unfinished runs with other settings: {', '.join(others)}" if others else ""
            print(f"{self.folder} has nothing to resume, the run begins at its first step{hint}.", file=sys.stderr)
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
        self.saved = None

    def save(self) -> None:
        """Write the state, then the metrics made from it: stopped in between, the resumed run loses nothing."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        for name in [name for name, part in self.parts.items() if isinstance(part, torch.nn.Module)]:
            remedy = "the state before is intact; lower --learning-rate"
            files.check_finite(parts[name], f"the {name}'s weights", remedy)
        state = self.state | {"seconds": self.seconds()}
        with files.replacing(self.folder / "state.pt") as temporary:
            torch.save({**self.about, "history": self.history, "state": state, "parts": parts}, temporary)
        files.write_lines(self.folder / "metrics.jsonl", self.history)

    def seconds(self) -> float:
        return self.state["seconds"] + time.time() - self.began

    def cached(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` gives; a resumed run takes it from its state."""
        if name not in self.state:
            self.state[name] = measure()
            self.save()
        return self.state[name]

    def of_base(self, name: str, measure: Callable[[], Any], *settings: str) -> Any:
        """What `measure` says of the base; runs under --out with equal code and settings share it."""
        names = ("task", "shots", "max_response", "seed", *EVALUATION, *settings)
        computed = self.base.device.type, files.dtype_name(self.base)
        key = [self.origin, files.code_checksum(), *computed, *(getattr(self.config, n) for n in names)]
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


def seeded(*key: object) -> torch.Generator:
    """A CPU generator seeded by a key like ("rollout", seed, step): no random state has to be saved."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


# ---------------------------------------------------------------------------------------------- names


def changes(config: RunConfig, reference: RunConfig) -> dict[str, Any]:
    """Every setting that is not the method's own, but for domain, seed and the size of the tests."""
    not_named = {"method", "domain", "seed", "eval_problems", "eval_samples", *INCIDENTAL}
    changed = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name
        usual = field.default if name in DECIDES_DEFAULTS else getattr(reference, name)  # the reference has the same
        if name not in not_named and value != usual:
            changed[name] = value
    return changed


def as_text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def changed_settings(config: RunConfig, reference: RunConfig) -> list[str]:
    """E.g. ['control false-ideas', 'dose 0.5'], for the rows of a table, which share the task and the tests."""
    shared = {field.name for field in dataclasses.fields(RunConfig)}
    changed = {name: value for name, value in changes(config, reference).items() if name not in shared}
    return [f"{name.replace('_', ' ')} {as_text(value)}" for name, value in changed.items()]


def run_name(config: RunConfig, reference: RunConfig) -> str:
    """E.g. 'rosd-mask=whole-domain=add-seed0': method, changed settings, domain, base, seed.

    A name that was shortened, or that could be read in two ways, ends in a checksum of all that it stands for.
    """
    changed = changes(config, reference)
    if config.domain not in ("", reference.domain):
        changed["domain"] = config.domain
    base, shipped = files.checksum(config.base), files.ROOT / reference.base
    if not shipped.is_file() or base != files.checksum(shipped):
        changed["base"] = f"{Path(config.base).resolve().name.removesuffix('.pt')}.{base}"
    words = ""
    for name, value in changed.items():
        last = as_text(value).rstrip("/").rpartition("/")[2]  # of a path
        words += f"-{name}={re.sub('[^A-Za-z0-9_.+%-]+', '_', last)}"
    name = f"{config.method}{words[:60]}-seed{config.seed}"
    # In lower case, because some file systems do not tell it from upper case.
    exact = all(re.fullmatch("[a-z0-9_.%-]+|True|False|None", as_text(value)) for value in changed.values())
    if exact and len(words) <= 60:
        return name
    return f"{name}-{zlib.crc32(repr((config.method, changed, config.seed)).encode()):08x}"


# ---------------------------------------------------------------------------------------------- task, base, device


def find_task(config: TaskConfig, *domains: str) -> Task:
    """The task that a config names; UserError where there is none, or where it lacks one of the domains; '' is any."""
    task = load_task(config.task, config.base, config.shots, config.max_response, config.reflect_shots)
    for domain in domains:
        if domain not in ("", *task.domains):
            raise UserError(f"{config.task} has no domain {domain!r}; give one of {', '.join(task.domains)}")
    return task


def open_task_and_base(config: TaskConfig, *domains: str) -> tuple[Task, GPT]:
    """The task, and the base, frozen, on its device; UserError where they do not match."""
    use_threads(config.base)
    task, device = find_task(config, *domains), pick_device(config.device)
    model = files.load_checkpoint(config.base, device)
    has, needed = model.config.vocab_size, task.vocab_size
    if has < needed or (has > needed and not task.spare_rows):
        sizes = f"{has} tokens, the task one of {needed}"
        raise UserError(f"{config.base} has a vocabulary of {sizes}; give the --task or the --base that belongs to it")
    return task, model.to(device).requires_grad_(False).eval()
