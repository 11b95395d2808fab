"""Token strips in one self-contained web page.

A strip is a row of tokens, each with a heat (its colour) and with a sentence that is shown when the reader points at it
or reaches it with the keyboard. Nothing here knows the methods; xray.py fills the pages.

>>> print(page("Title", "One *sentence*.", [section("Part", "text", [strip("y-", [Token("3", 0.5)], "wrong")])])[:15])
<!doctype html>
"""

import html
import re
from dataclasses import dataclass

CHOICES = list[tuple[str, float]]  # tokens and their probabilities, likeliest first


@dataclass(frozen=True)
class Token:
    text: str
    heat: float = 0.0  # 0 to 1
    dimmed: bool = False  # outside the mask
    quoted: bool = False  # within the reflector's quote
    start: bool = False  # k: the loss begins here
    says: str = ""  # one sentence about it
    choices: tuple[tuple[str, CHOICES], ...] = ()  # e.g. (("student", [("3", 0.9), ...]), ("teacher", ...))


def prose(text: str) -> str:
    """Escaped text with `code` and *emphasis*."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*([^*\d][^*]*)\*", r"<em>\1</em>", text)


def token_html(token: Token) -> str:
    classes = " ".join(
        name for name, on in (("dimmed", token.dimmed), ("quoted", token.quoted), ("start", token.start)) if on
    )
    rows = "".join(
        f"{name}|" + ",".join(f"{text}~{p:.3f}" for text, p in choices) + "\n" for name, choices in token.choices
    )
    label = html.escape(f"{token.text} {token.says}".strip(), quote=True)
    return (
        f'<button type="button" class="token {classes}" style="--heat:{min(1.0, max(0.0, token.heat)):.3f}" '
        f'aria-label="{label}" data-says="{html.escape(token.says, quote=True)}" '
        f'data-choices="{html.escape(rows, quote=True)}">{html.escape(token.text)}</button>'
    )


def strip(label: str, tokens: list[Token], badge: str = "", note: str = "") -> str:
    """One row: a label, a badge (right, wrong, or anything), the tokens, and a note below."""
    kind = badge if badge in ("right", "wrong") else "neutral"
    shown = f'<span class="badge {kind}">{html.escape(badge)}</span>' if badge else ""
    below = f'<p class="note">{prose(note)}</p>' if note else ""
    row = f'<div class="tokens">{"".join(map(token_html, tokens))}</div>'
    return f'<div class="strip"><div class="label">{prose(label)} {shown}</div>{row}{below}</div>'


def spectrum(label: str, values: list[float], rank: int, note: str = "") -> str:
    """Singular values as bars, scaled to the first; those within the rank are filled."""
    bars = "".join(
        f'<rect x="{8 * i}" y="{60 - 60 * v / values[0]:.1f}" width="6" height="{max(0.5, 60 * v / values[0]):.1f}" '
        f'class="{"kept" if i < rank else "cut"}"><title>s_{i + 1} = {v:.3g}</title></rect>'
        for i, v in enumerate(values)
    )
    picture = (
        f'<svg viewBox="0 0 {8 * len(values)} 60" role="img" aria-label="singular values, {rank} kept">{bars}</svg>'
    )
    return f'<figure class="spectrum">{picture}<figcaption>{prose(label)}<br>{prose(note)}</figcaption></figure>'


def columns(*parts: str) -> str:
    """Parts side by side, one below the other on a narrow screen."""
    return '<div class="columns">' + "".join(f"<div>{part}</div>" for part in parts) + "</div>"


def switch(name: str, views: dict[str, str]) -> str:
    """Views of which one is shown, chosen by radio buttons: no script needed."""
    inputs = "".join(
        f'<label><input type="radio" name="{name}" value="{i}"{" checked" if i == 0 else ""}> {prose(title)}</label>'
        for i, title in enumerate(views)
    )
    bodies = "".join(f'<div class="view" data-view="{i}">{body}</div>' for i, body in enumerate(views.values()))
    return f'<div class="switch"><div class="choices" role="radiogroup">{inputs}</div>{bodies}</div>'


def section(heading: str, text: str, parts: list[str]) -> str:
    return f"<section><h2>{prose(heading)}</h2><p>{prose(text)}</p>{''.join(parts)}</section>"


def page(title: str, intro: str, sections: list[str]) -> str:
    """One HTML file that needs no network: style and script are within."""
    views = ",".join(f'.switch:has(> .choices input[value="{i}"]:checked) > .view[data-view="{i}"]' for i in range(64))
    return (
        PAGE.replace("{views}", views)
        .replace("{title}", html.escape(title))
        .replace("{intro}", prose(intro))
        .replace("{body}", "".join(sections))
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #57606a; --line: #d0d7de; --hot: 213, 94, 0;
  --right: #006d4e; --wrong: #a13d00; --cut: #c3cad2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --soft: #9da7b1; --line: #30363d;
  --right: #3fc79a; --wrong: #ff9d5c; --cut: #3a424b; } }
body { margin: 0 auto; padding: 1rem 1rem 11rem; max-width: 72rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin: 2rem 0 0.2rem; }
p { max-width: 46rem; margin: 0.4rem 0; } code, .tokens { font-family: ui-monospace, monospace; }
.strip { margin: 0.5rem 0; } .label, .note, figcaption { font-size: 0.85rem; color: var(--soft); }
.note { overflow-wrap: anywhere; }
.badge { border: 1px solid; border-radius: 0.6rem; padding: 0 0.45rem; font-size: 0.75rem; }
.badge.right { color: var(--right); } .badge.wrong { color: var(--wrong); }
.tokens { display: flex; flex-wrap: wrap; row-gap: 3px; }
.token { font: inherit; min-width: 1.35ch; padding: 0.1rem 0.12rem; border: 0; border-bottom: 2px solid transparent;
  color: inherit; cursor: pointer; background: rgba(var(--hot), calc(0.85 * var(--heat))); }
.token.dimmed { opacity: 0.45; } .token.quoted { border-bottom-color: var(--wrong); }
.token.start { box-shadow: -2px 0 0 var(--ink); margin-left: 2px; }
.token:focus-visible, .token.shown { outline: 2px solid #0969da; outline-offset: 0; }
.columns { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
.choices { display: flex; gap: 1rem; flex-wrap: wrap; margin: 0.4rem 0; } .view { display: none; }
{views} { display: block; }
figure { margin: 0.4rem 0; } .spectrum svg { width: 100%; max-width: 22rem; height: auto; }
.kept { fill: rgb(var(--hot)); } .cut { fill: var(--cut); }
#panel { position: fixed; inset: auto 0 0 0; background: var(--paper); border-top: 1px solid var(--line);
  padding: 0.5rem 1rem; min-height: 8.5rem; font-size: 0.85rem; }
#panel > div { max-width: 72rem; margin: 0 auto; } #panel table { border-spacing: 0.8rem 0; margin-left: -0.8rem; }
#panel td { font-family: ui-monospace, monospace; white-space: nowrap; } #panel th { text-align: left; }
.legend { display: inline-block; width: 8rem; height: 0.8rem; vertical-align: middle;
  background: linear-gradient(90deg, transparent, rgba(var(--hot), 0.85)); border: 1px solid var(--line); }
</style></head><body>
<h1>{title}</h1><p>{intro}</p>
<p class="note">Colour: <span class="legend" role="img" aria-label="from none to much"></span> from none to much. Point
at a token, tap it, or reach it with Tab and the arrow keys; the panel below then says what is known about it.</p>
{body}
<div id="panel" role="status" aria-live="polite"><div>Choose a token.</div></div>
<script>
const panel = document.querySelector("#panel > div");
function cell(row, text, tag) { row.appendChild(document.createElement(tag)).textContent = text; }
function show(token) {
  document.querySelectorAll(".token.shown").forEach(other => other.classList.remove("shown"));
  token.classList.add("shown");
  panel.textContent = "";
  panel.appendChild(document.createElement("div")).textContent = "“" + token.textContent + "”  " + token.dataset.says;
  const table = panel.appendChild(document.createElement("table"));
  for (const line of token.dataset.choices.split("\\n").filter(Boolean)) {
    const bar = line.indexOf("|"), row = table.insertRow();
    cell(row, line.slice(0, bar), "th");
    for (const choice of line.slice(bar + 1).split(",")) {
      const at = choice.lastIndexOf("~");
      cell(row, choice.slice(0, at) + " " + Math.round(100 * choice.slice(at + 1)) + "%", "td");
    }
  }
}
for (const kind of ["mouseover", "focusin", "click"])
  document.addEventListener(kind, event => { if (event.target.matches(".token")) show(event.target); });
document.addEventListener("keydown", event => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || !document.activeElement.matches(".token")) return;
  const all = [...document.querySelectorAll(".token")].filter(token => token.offsetParent);
  const next = all[all.indexOf(document.activeElement) + step];
  if (next) { next.focus(); event.preventDefault(); }
});
</script></body></html>
"""
