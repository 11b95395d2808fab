"""The command line of every script, derived from its frozen dataclass, and how a script ends."""

import argparse
import dataclasses
import math
import os
import signal
import sys
import threading
import time
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from errors import UserError

Config = TypeVar("Config")
DECIDES_DEFAULTS = ("method", "preset", "task")  # settings that others' defaults may depend on


def option(
    default: Any,
    help: str,
    paper: str | None = None,
    choices: tuple = (),
    minimum: float | None = None,
    maximum: float | None = None,
    positional: bool = False,
) -> Any:
    """A field of a config that is a flag: default, meaning, the paper's value where it has one, what is allowed."""
    about = {"help": help, "paper": paper, "choices": choices, "limits": (minimum, maximum), "positional": positional}
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
    """Parse and validate the flags of a frozen dataclass, in a group for every class that declares some.

    defaults gives what depends on the method, the preset and the task; --help shows the values in force.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    kinds = typing.get_type_hints(config_class)
    first = Parser(add_help=False, allow_abbrev=False)  # reads the settings that decide defaults
    for declaring in (cls for cls in config_class.__mro__ if "__annotations__" in vars(cls)):
        names = [name for name in declaring.__annotations__ if fields.get(name) and fields[name].metadata]
        title = (declaring.__doc__ or "").partition("\n")[0]
        group = parser.add_argument_group(title if "(" not in title else "settings")
        for name in names:
            if not any(action.dest == name for action in parser._actions):  # a subclass may have declared it anew
                add_flag(group, fields[name], kinds[name])
                if name in DECIDES_DEFAULTS:
                    first.add_argument(f"--{name}", default=fields[name].default)
    parser.set_defaults(**defaults(**vars(first.parse_known_args(argv)[0])))
    values = vars(parser.parse_args(argv))
    for name, field in fields.items():
        if name in values and isinstance(values[name], list):
            values[name] = tuple(values[name])
        if name in values and field.metadata:
            check_limits(name, values[name], *field.metadata["limits"])
    return config_class(**values)


def add_flag(group: Any, field: dataclasses.Field, kind: Any) -> None:
    meta = field.metadata
    if typing.get_origin(kind) is not tuple and typing.get_args(kind):  # `int | None`
        kind = typing.get_args(kind)[0]
    default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else "%(default)s"
    notes = [] if field.default in (None, "", ()) else [f"default: {default}"]
    notes += [f"paper: {meta['paper']}"] if meta["paper"] else []
    text = meta["help"].replace("%", "%%") + (f" ({'; '.join(notes)})" if notes else "")
    settings: dict[str, Any] = {"default": field.default, "help": text}
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        settings["choices"] = meta["choices"] or None
        if typing.get_origin(kind) is tuple:
            settings |= {"type": typing.get_args(kind)[0], "nargs": "+"}
        else:
            settings |= {"type": kind, "metavar": None if meta["choices"] else kind.__name__.upper()}
    if meta["positional"]:
        group.add_argument(field.name, nargs="?", **settings)
    else:
        group.add_argument("--" + field.name.replace("_", "-"), **settings)


def check_limits(name: str, value: Any, low: float | None, high: float | None) -> None:
    if not isinstance(value, int | float):
        return
    inside = (low is None or value >= low) and (high is None or value <= high)
    if not inside or not math.isfinite(value):
        limits = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
        allowed = " and ".join(limits) or "a finite number"
        raise UserError(f"argument --{name.replace('_', '-')}: {value} is not allowed, give {allowed}")


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


def end_soon_after_ctrl_c(stopped: str, seconds: float = 5.0) -> None:
    """End the process even where one long operation keeps Python from seeing the interrupt."""
    if threading.current_thread() is not threading.main_thread():
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)  # written to by the signal itself, at once

    def watch() -> None:
        os.read(reading, 1)
        time.sleep(seconds)
        print(f"\n{stopped}", file=sys.stderr, flush=True)
        os._exit(130)

    threading.Thread(target=watch, daemon=True).start()


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table that is readable in a terminal and in markdown."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])
