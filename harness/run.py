"""One training run: its folder, what it saves and resumes, the progress it shows, the results it leaves.

    out/<run>/metrics.jsonl   a line per step
    out/<run>/results.json    configuration, seed, versions, commit, accuracies, time, peak memory
    out/<run>/model.pt        the trained model (a folder out/<run>/model if the base was a Hugging Face folder)
    out/<run>/state.pt        everything --resume needs; gone when the run is finished
    out/<run>/base-*.json     accuracies of the base, reused by every run under out/ with the same settings

With several processes (parallel.py) the first one writes the files and shows the progress.
"""

import dataclasses
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
from harness import files, parallel
from harness.cli import option
from model import GPT


@dataclass(frozen=True)
class TaskConfig:
    """The settings of every script that asks a model problems."""

    task: str = option("arithmetic", "what the problems are from: arithmetic, gym:NAME[,NAME...] or FILE.jsonl")
    shots: int = option(0, "worked examples in the prompts of a task in words", minimum=0)
    max_response: int | None = option(None, "tokens of a response to a task in words; unset: the task's", minimum=1)
    seed: int = option(0, "seed of everything random, test problems included", minimum=0, maximum=2**63 - 1)
    base: str = option("data/base.pt", "checkpoint to start from, or the folder of a Hugging Face model")
    device: str = option("auto", "cpu, cuda, mps or auto")
    threads: int = option(1, "CPU threads; more than one pays for larger models", minimum=1, maximum=1024)


@dataclass(frozen=True)
class RunConfig(TaskConfig):
    """The settings that every training script has."""

    domain: str = option("", "domain to train on; unset: the task's first, for SPD on arithmetic exam")
    out: str = option("out", "folder for runs")
    baseline: bool = option(True, "also train what the method is compared with, for the table")
    eval_problems: int = option(64, "test problems a domain", minimum=1)
    eval_samples: int = option(16, "samples a test problem", "16", minimum=1)
    eval_batch: int = option(512, "responses written at once, other than rollouts", minimum=1)
    eval_temperature: float = option(1.0, "temperature of the tests", "0.6", minimum=0)
    eval_top_p: float = option(1.0, "truncation (top-p) of the tests", "0.95", minimum=0.01, maximum=1)
    resume: bool = option(False, "go on from the last checkpoint of the same command")
    lora_rank: int = option(8, "--finetune lora: rank r of the adapters", "SPD 8", minimum=1)
    lora_alpha: float = option(8.0, "--finetune lora: alpha; adapters are scaled by alpha / r", "SPD 8")
    bf16: bool = option(False, "bfloat16 autocast while training, for GPUs")
    compile: bool = option(False, "torch.compile the blocks, for GPUs")


EVALUATION = ("eval_problems", "eval_samples", "eval_batch", "eval_temperature", "eval_top_p")
# Settings that say where and how fast, not what: they may change when a run is resumed.
INCIDENTAL = ("out", "base", "resume", "device", "threads", "baseline")  # the base is compared by its bytes

tqdm.set_lock(threading.RLock())  # its lock between processes would be reported as leaked when a run is stopped
SHOWN = ("loss", "accuracy", "quote_match")  # beside the progress bar


class Run:
    """A run's folder, claimed for this process; used as a context, so that others can claim it afterwards."""

    def __init__(self, config: RunConfig, name: str) -> None:
        self.task, self.base = open_task_and_base(config, config.domain)
        self.config = config = dataclasses.replace(config, domain=config.domain or self.task.domains[0])
        self.origin = {"base_checksum": files.checksum(config.base), "problems_checksum": self.task.problems_checksum}
        self.about = {"config": files.plain(config), **self.origin}
        self.folder = files.make_folder(Path(config.out) / name)
        self.state: dict[str, Any] = {"history": [], "seconds": 0.0}  # plain values and tensors, saved with the run
        self.parts: dict[str, Any] = {}  # models and optimizers, saved with the run
        self.batch: list = []  # what the loop learns from now, kept if that ends in numbers that are not finite
        self.results: dict[str, Any] = {}  # of the finished run, if --resume finds one
        if (path := self.folder / "results.json").exists():
            finished = files.read_json(path)
            self.check_same(finished, path)
            if config.resume and not (self.folder / "state.pt").exists():
                self.results = finished

    def __enter__(self) -> "Run":
        self.began = time.time()
        self.lock = files.lock_folder(self.folder) if parallel.FIRST else None
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if isinstance(error, FloatingPointError):  # the state is the one before this batch
                path, everything = self.folder / "bad_batch.json", parallel.gather(files.plain(self.batch))
                if parallel.FIRST:
                    files.write_json(path, everything)
                raise UserError(f"{error}; its batch is in {path}, try a lower --learning-rate") from error
        finally:
            if self.lock:
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

    def restore(self, **parts: Any) -> None:
        """Name the models and optimizers that make up the run's state; with --resume, load them."""
        self.parts, path = parts, self.folder / "state.pt"
        if path.exists() and not self.config.resume and parallel.FIRST:
            print(f"{self.folder}: starts anew; --resume would have gone on where it stopped.", file=sys.stderr)
        if not (path.exists() and self.config.resume):
            return
        try:
            saved = torch.load(path, map_location=self.base.device, weights_only=True)
            self.check_same(saved, path)
            for name, part in parts.items():
                part.load_state_dict(saved["parts"][name])
            self.state = saved["state"]
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{path} is damaged; delete it and run again, from the start") from error
        self.write_metrics()

    def save(self) -> None:
        """Write the state, then the metrics made from it: stopped in between, the resumed run loses nothing."""
        if not parallel.FIRST:
            return
        for name, part in self.parts.items():
            if isinstance(part, torch.nn.Module):
                files.check_finite(part, f"the {name}'s weights", "the state before is intact; lower --learning-rate")
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        state = self.state | {"seconds": self.seconds()}
        with files.replacing(self.folder / "state.pt") as temporary:
            torch.save({**self.about, "state": state, "parts": parts}, temporary)
        self.write_metrics()

    def write_metrics(self) -> None:
        if parallel.FIRST:
            files.write_lines(self.folder / "metrics.jsonl", self.state["history"])

    def seconds(self) -> float:
        return self.state["seconds"] + time.time() - self.began

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` gives, measured by the first process alone, and never again once the state is saved."""
        if name not in self.state:
            self.state[name] = measure() if parallel.FIRST else None
        return self.state[name]

    def of_base(self, name: str, measure: Callable[[], Any], *settings: str) -> Any:
        """What `measure` says of the base; runs under --out with equal code and settings share it."""
        if not parallel.FIRST:
            return None
        names = ("task", "shots", "max_response", "seed", "threads", *EVALUATION, *settings)
        asked = [self.origin, files.code_checksum(), self.base.device.type, *(getattr(self.config, n) for n in names)]
        file = f"base-{name}-{zlib.crc32(repr(asked).encode()):08x}.json"
        path = next(self.folder.parent.glob(f"*/{file}"), self.folder / file)
        if not path.exists():
            files.write_json(path, {"asked": asked, "measured": measure()})
        return files.read_json(path)["measured"]

    def finish(self, model: GPT, **content: Any) -> dict[str, Any]:
        """Write the model and results.json; the state is not needed any more."""
        results = {"name": self.folder.name, **self.about, **provenance(), "habits": dict(self.task.habits)}
        results |= {"seconds": self.seconds(), "peak_memory_mb": peak_memory_mb(), **content}
        if parallel.FIRST:
            if self.state["history"] and all(row["loss"] is None for row in self.state["history"]):
                print(f"{self.folder}: no step had anything to learn from, the model is the base.", file=sys.stderr)
            self.write_metrics()
            files.save_model(self.folder, model, self.config.base)
            files.write_json(self.folder / "results.json", results)
            (self.folder / "state.pt").unlink(missing_ok=True)
        return files.plain(results)

    # ------------------------------------------------------------------------------------------ randomness

    def random(self, name: str, *key: object) -> random.Random:
        """For what all processes draw alike."""
        return random.Random(" ".join(map(str, (name, self.config.seed, *key))))

    def generator(self, name: str, *key: object) -> torch.Generator:
        """For what each process draws by itself; a CPU generator."""
        return seeded(name, self.config.seed, *key, *([parallel.RANK] if parallel.RANK else []))

    # ------------------------------------------------------------------------------------------ progress

    def steps(self, count: int) -> Iterator[int]:
        """The steps still to be made, under a progress bar."""
        done = len(self.state["history"])
        bar = {"initial": done, "total": count, "desc": self.folder.name, "position": parallel.bar_position()}
        with tqdm(range(done, count), disable=not parallel.FIRST, dynamic_ncols=True, **bar) as self.progress:
            yield from self.progress

    def log(self, **measures: Any) -> None:
        """Add a line to the metrics: lists are averaged and ints added up over all processes, all else is as it is."""
        parts, row = parallel.gather([measures]), {"step": len(self.state["history"])}
        for name, value in measures.items():
            if isinstance(value, list):
                values = [x for part in parts for x in part[name]]
                row |= {name: sum(values) / len(values)} if values else {}
            else:
                row[name] = sum(part[name] for part in parts) if isinstance(value, int) else value
        self.state["history"].append(row)
        if row.get("loss", 0) is None and parallel.FIRST:
            self.progress.write(f"step {row['step']}: nothing to learn from, no update", file=sys.stderr)
        self.progress.set_postfix({name: f"{row[name]:.3g}" for name in SHOWN if row.get(name) is not None})


def seeded(*key: object) -> torch.Generator:
    """A CPU generator seeded by a key like ("rollout", seed, step): no random state has to be saved."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def run_name(config: RunConfig) -> str:
    """E.g. 'rosd-mask=whole-add-seed0': method, changed settings (but for test size and INCIDENTAL), domain, seed."""
    no_flag = {"method", "domain", "seed", "eval_problems", "eval_samples", *INCIDENTAL}
    flags = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in no_flag and value != field.default:
            shown = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
            flags.append(f"{field.name}={''.join(c if c.isalnum() or c in '+.-' else '_' for c in shown)}")
    base = files.checksum(config.base)
    if not files.BASE_CHECKPOINT.is_file() or base != files.checksum(files.BASE_CHECKPOINT):
        flags.append(f"base={Path(config.base).name.removesuffix('.pt')}.{base}")
    where = [config.domain] if config.domain else []
    name = "-".join([config.method, *flags, *where, f"seed{config.seed}"])
    return name if len(name) < 200 else f"{name[:180]}-{zlib.crc32(name.encode()):08x}"  # file systems allow 255


def find_task(config: TaskConfig, *domains: str) -> Task:
    """The task that a config names; UserError where there is none, or where it lacks one of the domains; '' is any."""
    task = load_task(config.task, config.base, config.shots, config.max_response)
    for domain in domains:
        if domain not in ("", *task.domains):
            raise UserError(f"{config.task} has no domain {domain!r}; give one of {', '.join(task.domains)}")
    return task


def open_task_and_base(config: TaskConfig, *domains: str) -> tuple[Task, GPT]:
    """The task, and the base, frozen, on the device that parallel.start picks; UserError where they do not match."""
    torch.set_num_threads(config.threads)
    task = find_task(config, *domains)
    device = parallel.start(config.device)
    model = files.load_checkpoint(config.base)
    has, needed = model.config.vocab_size, task.vocab_size
    if has < needed or (has > needed and not task.spare_rows):
        sizes = f"{has} tokens, the task one of {needed}"
        raise UserError(f"{config.base} has a vocabulary of {sizes}; give the --task or the --base that belongs to it")
    return task, model.to(device).requires_grad_(False).eval()


def compile_blocks(model: GPT) -> None:
    """Compile the blocks with torch.compile, one program for all layers; hooks put on their parts do not fire."""
    torch._dynamo.config.recompile_limit = 32  # prompts, single tokens and training, with and without a mask
    for block in model.blocks:
        block.compile(dynamic=True)


def provenance() -> dict[str, Any]:
    """Versions, commit and number of processes, for every results file."""

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
    return {"commit": commit, "python": platform.python_version(), **versions, "processes": parallel.WORLD}


def peak_memory_mb() -> float | None:
    """The largest memory of this process so far, in MB of 2**20 bytes: the GPU's, or else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
