"""Files that are never half written, always UTF-8, and hold no NaN; checkpoints that never run code."""

import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy
import tiktoken
import torch

from errors import UserError
from harness.device import slow_in_bfloat16
from hub.weights import their_name
from model import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
BASE_CHECKPOINT = ROOT / "data" / "base.pt"
HUB_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
HUB_FILES += ("special_tokens_map.json", "added_tokens.json")  # all that decides what a model does, beside its weights


def make_folder(path: Path) -> Path:
    """Create an output folder and check that it can be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"cannot write to {path} ({error.strerror}); choose another folder with --out") from error
    return path


def lock_folder(folder: Path) -> IO:
    """An open file that no other process can lock until it is closed or this process ends, however it ends."""
    try:
        file = (folder / ".lock").open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); choose another folder with --out") from error
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise UserError(f"another process is running in {folder}; wait for it, or give another --out") from error
    except OSError:  # a file system without locks
        pass
    return file


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` and move it there only when everything has been written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two runs may write the same file about their base
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        cause = getattr(error, "strerror", None) or "the disk is probably full"
        raise UserError(f"could not write {path} ({cause}); free some space, its last version is intact") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def plain(value: Any) -> Any:
    """The value as JSON can hold it: dataclasses as objects, and None for a number that is not finite."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(plain(content), indent=1, allow_nan=False) + "\n")


def write_lines(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read or is damaged; delete it and run its command again") from error


# ---------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(path: Path, model: GPT) -> None:
    """Write weights and shape; UserError where a weight is not finite."""
    remedy = "nothing was written; try a lower learning rate"
    check_finite(model.state_dict(), f"the weights that were to go to {path}", remedy)
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        torch.save({"config": dataclasses.asdict(model.config), "model": state}, temporary)


def save_model(folder: Path, model: GPT, base: Path | str) -> None:
    """Write folder/model.pt; for a Hugging Face base folder/model, with its tokenizer, in the model's number format."""
    if not Path(base).is_dir():
        return save_checkpoint(folder / "model.pt", model)
    from safetensors.torch import save_file

    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    check_finite(weights, f"the weights that were to go to {folder}", "nothing was written; try a lower learning rate")
    folder = make_folder(folder / "model")
    for name in HUB_FILES:
        if (Path(base) / name).is_file():
            write_text(folder / name, read_text(Path(base) / name))
    dtype = {"dtype": dtype_name(model), "torch_dtype": dtype_name(model)}  # which need not be the base's
    write_json(folder / "config.json", read_json(folder / "config.json") | dtype)
    with replacing(folder / "model.safetensors") as temporary:
        save_file({their_name(name): x.contiguous() for name, x in weights.items()}, temporary, {"format": "pt"})
        temporary.chmod(0o644)  # safetensors makes it readable by its owner alone


def load_checkpoint(path: Path | str, device: torch.device | str = "cpu") -> GPT:
    """The model of a checkpoint or of a Hugging Face folder, for a device; UserError where it cannot be loaded.

    A folder's own number format is kept, but on a CPU without bfloat16 units float32 is several times as fast.
    """
    if Path(path).is_dir():
        return GPT.from_pretrained(path, torch.float32 if slow_in_bfloat16(device) else None)
    path = find_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = GPT(GPTConfig(**state["config"]))
        model.load_state_dict({name: tensor.float() for name, tensor in state["model"].items()})
    except Exception as error:
        raise UserError(f"{path} is no checkpoint of this project or is damaged; make it with pretrain.py") from error
    check_finite(model.state_dict(), str(path), "make it anew with pretrain.py")
    return model


def find_file(path: Path | str) -> Path:
    """The checkpoint at a path, taken from the repository's folder if it is not found from the current one."""
    found = Path(path) if Path(path).is_file() else ROOT / path
    if not found.is_file() and Path(path).suffix == ".pt":
        raise UserError(f"no checkpoint at {path}; make one with `python pretrain.py --out {path}`")
    if not found.is_file():
        raise UserError(f"no model folder at {path}; download it, or `python -m tools.smollm2 smollm2` makes one")
    return found


def check_finite(state: dict[str, torch.Tensor], what: str, remedy: str) -> None:
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"{what}: {name} holds a number that is not finite; {remedy}")


def checksum(path: Path | str) -> str:
    """Which bytes a checkpoint or a Hugging Face folder holds, whatever its name: eight hexadecimal digits."""
    folder, sum = Path(path), 0
    parts = [folder / name for name in HUB_FILES if (folder / name).is_file()] + sorted(folder.glob("*.safetensors"))
    for part in parts if folder.is_dir() else [find_file(path)]:
        sum = zlib.crc32(part.name.encode() if folder.is_dir() else b"", sum)  # a checkpoint may have any name
        with part.open("rb") as file:
            while block := file.read(1 << 24):
                sum = zlib.crc32(block, sum)
    return f"{sum:08x}"


def code_checksum() -> str:
    """Which version of the model, the tasks and the methods this is: figures of another one are not to be reused.

    Blank lines and lines with nothing but a comment change no figure and do not count.
    """
    paths = [path for folder in (ROOT, ROOT / "data", ROOT / "hub") for path in sorted(folder.glob("*.py"))]
    lines = [line for path in paths for line in read_text(path).splitlines() if line.strip()]
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    return f"{zlib.crc32((text + torch.__version__).encode()):08x}"


def dtype_name(model: GPT) -> str:
    return str(model.embed.weight.dtype).removeprefix("torch.")


def provenance(base: GPT) -> dict[str, Any]:
    """Versions, commit, number format, threads and device, for every results file."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        if git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.pt"):
            commit += "+changes"
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {"torch": torch.__version__, "numpy": numpy.__version__, "tiktoken": tiktoken.__version__}
    computed = {"dtype": dtype_name(base), "threads": torch.get_num_threads(), "device": base.device.type}
    return {"commit": commit, "python": platform.python_version(), **versions, **computed}
