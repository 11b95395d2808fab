"""Token strips in one self-contained web page, page.html.

A strip is a row of tokens, each with a heat (its colour) and with a sentence that is shown when the reader points at it
or reaches it with the keyboard. Nothing here knows the methods; xray.py fills the pages.

>>> print(page("Title", "One *sentence*.", [section("Part", "text", [strip("y-", [Token("3", 0.5)], "wrong")])])[:15])
<!doctype html>
"""

import json
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from harness import files

Choices = list[tuple[str, float]]  # tokens and their probabilities, likeliest first


@dataclass(frozen=True)
class Token:
    text: str
    heat: float = 0.0  # 0 to 1
    dimmed: bool = False  # outside the mask
    quoted: bool = False  # within the reflector's quote
    start: bool = False  # k: the loss begins here
    says: str = ""  # one sentence about it
    choices: tuple[tuple[str, Choices], ...] = ()  # e.g. (("student", [("3", 0.9), ...]), ("teacher", ...))


def prose(text: str) -> str:
    """Escaped text with `code` and *emphasis*."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*([^*\d][^*]*)\*", r"<em>\1</em>", text)


def token_html(token: Token) -> str:
    classes = " ".join(["token", *(name for name in ("dimmed", "quoted", "start") if getattr(token, name))])
    return (
        f'<button type="button" class="{classes}" style="--heat:{min(1.0, max(0.0, token.heat)):.3f}" '
        f'aria-label="{escape(f"{token.text} {token.says}".strip())}" data-says="{escape(token.says)}" '
        f'data-choices="{escape(json.dumps(token.choices))}">{escape(token.text)}</button>'
    )


def strip(label: str, tokens: list[Token], badge: str = "", note: str = "") -> str:
    """One row: a label, a badge (right or wrong), the tokens, and a note below."""
    shown = f'<span class="badge {badge}">{badge}</span>' if badge else ""
    below = f'<p class="note">{prose(note)}</p>' if note else ""
    row = f'<div class="tokens">{"".join(map(token_html, tokens))}</div>'
    return f'<div class="strip"><div class="label">{prose(label)} {shown}</div>{row}{below}</div>'


def columns(*parts: str) -> str:
    """Parts side by side, one below the other on a narrow screen."""
    return '<div class="columns">' + "".join(f"<div>{part}</div>" for part in parts) + "</div>"


def switch(name: str, views: dict[str, str]) -> str:
    """Views of which one is open at a time, the first to begin with; no script needed."""
    opened = ["open", *[""] * len(views)]
    return "".join(
        f'<details name="{name}" {state}><summary>{prose(title)}</summary>{body}</details>'
        for state, (title, body) in zip(opened, views.items(), strict=False)
    )


def section(heading: str, text: str, parts: list[str]) -> str:
    return f"<section><h2>{prose(heading)}</h2><p>{prose(text)}</p>{''.join(parts)}</section>"


def page(title: str, intro: str, sections: list[str]) -> str:
    """One HTML file that needs no network: style and script are within."""
    form = Template(files.read_text(Path(__file__).with_name("page.html")))
    return form.substitute(title=escape(title), intro=prose(intro), body="".join(sections))
