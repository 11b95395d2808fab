"""The command line of every script, derived from its frozen dataclass, and how a script ends."""

import argparse
import dataclasses
import math
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from errors import UserError

Config = TypeVar("Config")


def option(
    default: Any,
    help: str,
    paper: str | None = None,
    choices: tuple = (),
    minimum: float | None = None,
    maximum: float | None = None,
    positional: bool = False,
) -> Any:
    """A field of a config: its default, what it means, the paper's value where it has one, what is allowed.

    The default None stands for a value that depends on other settings; the help text says on which.
    """
    about = {"help": help, "paper": paper, "choices": choices, "limits": (minimum, maximum), "positional": positional}
    return dataclasses.field(default=default, metadata=about)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; --help explains every flag")


def parse_config(config_class: type[Config], description: str, argv: list[str] | None = None) -> Config:
    """Derive the command line from a frozen dataclass of options, parse it and validate it."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    kinds = typing.get_type_hints(config_class)
    for name in dict.fromkeys([*config_class.__annotations__, *fields]):  # the script's own settings first
        add_flag(parser, fields[name], kinds[name])
    values = vars(parser.parse_args(argv))
    for name, field in fields.items():
        check_limits(name, values[name], *field.metadata["limits"])
        if isinstance(values[name], list):
            values[name] = tuple(values[name])
    return config_class(**values)


def add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: Any) -> None:
    meta = field.metadata
    if isinstance(kind, types.UnionType):  # `float | None`
        kind = typing.get_args(kind)[0]
    shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    notes = [] if field.default is None else [f"default: {shown}"]
    notes += [f"paper: {meta['paper']}"] if meta["paper"] else []
    text = f"{meta['help']} ({'; '.join(notes)})" if notes else meta["help"]
    settings: dict[str, Any] = {"default": field.default, "help": text.replace("%", "%%")}
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        settings["choices"] = meta["choices"] or None
        if typing.get_origin(kind) is tuple:
            settings |= {"type": typing.get_args(kind)[0], "nargs": "+"}
        else:
            settings |= {"type": kind, "metavar": None if meta["choices"] else kind.__name__.upper()}
    if meta["positional"]:
        parser.add_argument(field.name, nargs="?", **settings)
    else:
        parser.add_argument("--" + field.name.replace("_", "-"), **settings)


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
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table that is readable in a terminal and in markdown."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])
