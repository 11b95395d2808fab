"""What every script shares: command line, device, checkpoints, result files, tables. Neither paper is in here."""

import argparse
import ctypes
import dataclasses
import json
import os
import platform
import subprocess
import sys
import typing
import zlib
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy
import tiktoken
import torch

import parallel
from data.arithmetic import GAPS
from data.tokenizer import VOCAB_SIZE
from model import GPT, GPTConfig

ROOT = Path(__file__).parent
BASE_CHECKPOINT = ROOT / "data" / "base.pt"
RESULTS = ROOT / "results"  # what tables and pictures are made from
Config = TypeVar("Config")


class UserError(Exception):
    """Bad input: the message names the cause and the remedy in one sentence; the script prints it and exits with 2."""


# ---------------------------------------------------------------------------------------------- command line


def option(
    default: Any,
    help: str,
    paper: str | None = None,
    choices: tuple = (),
    minimum: float | None = None,
    maximum: float | None = None,
    positional: bool = False,
) -> Any:
    """A field of a config: its default, what it means, the paper's value where it has one, what is allowed."""
    metadata = {
        "help": help,
        "paper": paper,
        "choices": choices,
        "limits": (minimum, maximum),
        "positional": positional,
    }
    return dataclasses.field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; --help explains every flag")


def parse_config(config_class: type[Config], description: str, argv: list[str] | None = None) -> Config:
    """Derive the command line from a frozen dataclass of options, parse and validate it."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        meta, kind = field.metadata, types[field.name]
        shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text = f"{meta['help']} (default: {shown}" + (f"; paper: {meta['paper']})" if meta["paper"] else ")")
        settings: dict[str, Any] = {"default": field.default, "help": text.replace("%", "%%")}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            settings |= {"type": typing.get_args(kind)[0], "nargs": "+", "choices": meta["choices"] or None}
        else:
            settings |= {"type": kind, "choices": meta["choices"] or None}
            settings["metavar"] = None if meta["choices"] else kind.__name__.upper()
        if meta["positional"]:
            parser.add_argument(field.name, nargs="?", **settings)
        else:
            parser.add_argument("--" + field.name.replace("_", "-"), **settings)
    values = vars(parser.parse_args(argv))
    for field in dataclasses.fields(config_class):
        value, (low, high) = values[field.name], field.metadata["limits"]
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            allowed = f"at least {low}" if high is None else f"a value from {low} to {high}"
            parser.error(f"argument --{field.name.replace('_', '-')}: {value} is not allowed, give {allowed}")
        if isinstance(value, list):
            values[field.name] = tuple(value)
    return config_class(**values)


def run_script(main: Callable[[], None], stopped: str = "Stopped.") -> None:
    """Call main; turn a UserError into one sentence and exit code 2, Ctrl-C into `stopped` and exit code 130."""
    keep_freed_memory()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks for the next tensors: fetching fresh pages takes a sixth of an update on CPUs."""
    with suppress(OSError, AttributeError):  # other C libraries have other ways
        for parameter, value in ((-1, 1 << 30), (-3, 1 << 25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL("libc.so.6").mallopt(parameter, value)


def torch_generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by a key like ("rollout", seed, step): no random state has to be carried along."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def pick_device(name: str = "auto") -> torch.device:
    """'auto' takes CUDA, then MPS, then the CPU; any other name is tried as it is."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here; give --device auto, cpu, cuda or mps") from error


# ---------------------------------------------------------------------------------------------- files


def make_folder(path: Path) -> Path:
    """Create an output folder and check that it can be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".probe").touch()
        (path / ".probe").unlink(missing_ok=True)  # another process may have been faster
    except OSError as error:
        raise UserError(f"cannot write to {path} ({error.strerror}); choose another folder with --out") from error
    return path


@contextmanager
def replacing(path: Path) -> typing.Iterator[Path]:
    """Give a temporary path beside `path` and move it there only when everything has been written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if "No space" not in str(error) and "write failed" not in str(error) and not isinstance(error, OSError):
            raise
        raise UserError(
            f"could not write {path} ({error}); free some space, what was there before is intact"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_lines(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def save_checkpoint(path: Path, model: GPT, **extra: Any) -> None:
    """Write weights, shape and extra state atomically; only tensors and plain values, so loading never runs code."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        torch.save({"config": dataclasses.asdict(model.config), "model": state, **extra}, temporary)


def load_checkpoint(path: Path | str) -> tuple[GPT, dict]:
    """Model and extra state of a checkpoint; UserError where it is missing, corrupt or of another vocabulary.

    A relative path that leads nowhere from the current folder is taken from the repository's.
    """
    given, path = path, Path(path) if Path(path).is_file() else ROOT / path
    if not path.is_file():
        raise UserError(f"no checkpoint at {given}; make one with `python pretrain.py --out {given}`")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = GPT(GPTConfig(**state.pop("config")))
        weights = {name: tensor.float() for name, tensor in state.pop("model").items()}
        model.load_state_dict(weights)
    except Exception as error:
        raise UserError(
            f"{path} is not a checkpoint of this project or is damaged; make it anew with pretrain.py"
        ) from error
    if model.config.vocab_size != VOCAB_SIZE:
        sizes = f"{model.config.vocab_size} tokens, this code one of {VOCAB_SIZE}"
        raise UserError(f"{path} has a vocabulary of {sizes}; make it anew with pretrain.py")
    return model, state


def check_world(base: str, domain: str) -> None:
    """UserError where a domain of the second world is asked of the shipped base, which never saw one."""
    if domain in GAPS and (ROOT / base).resolve() == BASE_CHECKPOINT:
        raise UserError(f"data/base.pt does not know the domain {domain}; give --base data/gaps.pt")


def finished(folder: Path, config: Any) -> dict | None:
    """The results of a run that is to be resumed but had come to its end already."""
    path = folder / "results.json"
    if not config.resume or not path.exists() or (folder / "state.pt").exists():
        return None
    results = json.loads(path.read_text())
    same_config(results["config"], config, path)
    return results


def run_name(config: Any) -> str:
    """E.g. 'rosd-mask=whole-add-seed0': method, domain, seed, and what else in training is not the default."""
    unnamed = {"out", "resume", "device", "threads", "baseline", "eval_problems", "eval_samples"}
    flags = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in unnamed | {"method", "domain", "seed"} and value != field.default:
            value = Path(value).stem if field.name == "base" else value
            shown = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
            flags.append(f"{field.name}={''.join(c if c.isalnum() or c in '+.-' else '_' for c in shown)}")
    return "-".join([config.method, *flags, config.domain, f"seed{config.seed}"])


def same_config(saved: dict, config: Any, path: Path) -> None:
    """UserError where a run that is to be resumed was started with other settings."""
    now = json.loads(json.dumps(dataclasses.asdict(config)))  # as a results file holds it: lists for tuples
    fresh = {field.name: field.default for field in dataclasses.fields(config)}  # of a field added since
    saved = json.loads(json.dumps(fresh | saved))
    other = [name for name in now if name not in ("resume", "threads") and saved[name] != now[name]]
    if other:
        raise UserError(
            f"{path} was started with another {', '.join(other)}; give the same flags, or leave out --resume"
        )


def provenance() -> dict[str, Any]:
    """Versions, commit and number of processes, for every results file."""
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(  # of what makes a result, not of the results
            [*git, "status", "--porcelain", "-uno", "--", "*.py", "*.pt"], capture_output=True, text=True, check=True
        ).stdout
        commit += "+changes" if changed.strip() else ""
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {"torch": torch.__version__, "numpy": numpy.__version__, "tiktoken": tiktoken.__version__}
    return {"commit": commit, "python": platform.python_version(), **versions, "processes": parallel.WORLD}


def about(folder: Path, config: Any, seconds: float) -> dict[str, Any]:
    """What every results file says of its run: name, configuration, versions, commit, time, peak memory."""
    settings = {"name": folder.name, "config": dataclasses.asdict(config)}
    return {**settings, **provenance(), "seconds": seconds, "peak_memory_mb": peak_memory_mb()}


def peak_memory_mb() -> float:
    """The largest memory of this process so far, in MB: the GPU's where there is one, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table that is readable in a terminal and in markdown."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


def put_into_readme(name: str, text: str) -> bool:
    """Replace what stands between `<!-- table NAME -->` and the next `<!-- end -->`; False where no README has it."""
    begin, end = f"<!-- table {name} -->\n", "<!-- end -->"
    for path in (ROOT / "README.md", ROOT / "results" / "README.md"):
        if begin in path.read_text():
            before, rest = path.read_text().split(begin)
            write_text(path, before + begin + text + "\n" + end + rest.split(end, 1)[1])
            return True
    return False
