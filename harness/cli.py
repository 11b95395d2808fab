"""The command line of every script, derived from its frozen dataclass, and how a script ends."""

import argparse
import dataclasses
import inspect
import math
import os
import signal
import socket
import sys
import threading
import time
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from errors import UserError

Config = TypeVar("Config")
DECIDES_DEFAULTS = ("method", "preset")  # settings that the defaults of others may depend on


def option(
    default: Any,
    help: str,
    paper: str | None = None,
    choices: tuple = (),
    minimum: float | None = None,
    maximum: float | None = None,
    or_zero: bool = False,
    positional: bool = False,
) -> Any:
    """A field of a config that is a flag: default, meaning, the paper's value where it has one, what is allowed."""
    limits = (minimum, maximum, or_zero)
    about = {"help": help, "paper": paper, "choices": choices, "limits": limits, "positional": positional}
    return dataclasses.field(default=default, metadata=about)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; --help explains every flag")


def parse_config(
    config_class: type[Config],
    description: str,
    argv: list[str] | None = None,
    defaults: Callable[..., dict[str, Any]] = lambda **_: {},
) -> Config:
    """Parse and check the flags of a frozen dataclass; --help has a group for every class that declares some.

    defaults gives the defaults that depend on the method and the preset; --help shows those in force.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.metadata}
    kinds = typing.get_type_hints(config_class)
    deciding = Parser(add_help=False, allow_abbrev=False)
    for name in set(DECIDES_DEFAULTS) & set(fields):
        deciding.add_argument(f"--{name}", default=fields[name].default)
    in_force = defaults(**vars(deciding.parse_known_args(argv)[0]))

    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for declaring in config_class.__mro__:
        names = [name for name in inspect.get_annotations(declaring) if name in fields]
        title = (declaring.__doc__ or "").partition("\n")[0]
        group = parser.add_argument_group(title if "(" not in title else "settings")  # a dataclass's own is its shape
        for name in names:
            field = fields.pop(name)  # a subclass may have declared it anew
            add_flag(group, field, kinds[name], in_force.get(name, field.default))
    values = vars(parser.parse_args(argv))
    values = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
    config = config_class(**in_force | values)  # a default in force may be of a field without a flag
    check_values(config)
    return config


def add_flag(group: Any, field: dataclasses.Field, kind: Any, default: Any) -> None:
    meta, several = field.metadata, typing.get_origin(kind) is tuple
    if typing.get_args(kind):  # `int | None` or `tuple[str, ...]`
        kind = typing.get_args(kind)[0]
    text = " ".join(map(str, default)) if several else default
    notes = [] if text in (None, "") else [f"default: {text}"]
    notes += [f"paper: {meta['paper']}"] if meta["paper"] else []
    text = (meta["help"] + (f" ({'; '.join(notes)})" if notes else "")).replace("%", "%%")
    settings: dict[str, Any] = {"default": default, "help": text}
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        settings |= {"type": kind, "choices": meta["choices"] or None, "nargs": "+" if several else None}
        settings["metavar"] = None if meta["choices"] or several else kind.__name__.upper()
    if meta["positional"]:
        group.add_argument(field.name, **(settings | {"nargs": "?"}))
    else:
        group.add_argument("--" + field.name.replace("_", "-"), **settings)


def check_values(config: Any) -> None:
    """Raise UserError where a setting is not one of its choices or outside its limits, wherever it comes from."""
    for field in dataclasses.fields(config):
        if not field.metadata:
            continue
        value, choices = getattr(config, field.name), field.metadata["choices"]
        low, high, or_zero = field.metadata["limits"]
        wrong = f"argument --{field.name.replace('_', '-')}: {value!s:.40} is not allowed, give"
        if choices and value not in choices:
            raise UserError(f"{wrong} one of {', '.join(choices)}")
        if not isinstance(value, int | float) or (value == 0 and or_zero):
            continue
        if high is None and isinstance(value, int):
            high = 10**9
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            limits = ["0 or"] * or_zero + [f"at least {low}"] * (low is not None)
            limits += ["and"] * (low is not None and high is not None) + [f"at most {high}"] * (high is not None)
            raise UserError(f"{wrong} {' '.join(limits) or 'a finite number'}")


# ---------------------------------------------------------------------------------------------- the end of a script


def run_script(main: Callable[[], None], stopped: str = "Stopped.") -> None:
    """Call main; a UserError becomes one sentence and exit code 2, Ctrl-C `stopped` and exit code 130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has no encoding
            stream.reconfigure(errors="replace")  # a console without UTF-8 shows '?' instead of ending the script
    end_soon_after_ctrl_c(stopped)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.set_wakeup_fd(-1)


def end_soon_after_ctrl_c(stopped: str, seconds: float = 3.0) -> None:
    """Let a thread end the process even where one long operation keeps Python from seeing the interrupt."""
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.fileno())  # the signal itself writes to it, at once

    def watch() -> None:
        reading.recv(1)
        time.sleep(seconds)
        print(f"\n{stopped}", file=sys.stderr, flush=True)
        writing.close()
        os._exit(130)

    threading.Thread(target=watch, daemon=True).start()


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table that is readable in a terminal and in markdown."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])
