r"""Find a final answer in a response and compare it with the golden one: as numbers, or else as texts.

A number counts only if nothing numeric or operator-like belongs to it. A text that can be read in two ways has no
answer, which is better than a wrong verdict.

>>> final_answer("6 * 7 = 42. So the answer is **$42.00**.", "42"), final_answer("Answer: 5 or 6", "5")
('42.00', None)
>>> equal("42.00", "$42"), equal("1 1/2", "1.5"), equal("–3", "3"), equal("Monday.", "monday")
(True, True, False, True)
"""

import random
import re
import unicodedata
from fractions import Fraction
from itertools import groupby

MARK = "The answer is"  # before the answer in golden solutions, and where a prompt asks for it
MARKS = re.compile(r"answer\W{0,3}\s*(?:is\b:?|:|=)\**|####", re.IGNORECASE)
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")

INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
UNSIGNED = rf"(?:\d+ )?\d+ ?/ ?\d+|(?:{INTEGER}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d\d?)?"
NUMBER = rf"(?P<sign>[$€£¥]*[-+]?|[-+][$€£¥]*)(?P<number>{UNSIGNED}) ?(?:%|°[CF]?|[$€£¥]+)?"
ALONE = re.compile(rf"[\"'“(]*{NUMBER}[\"'”)]*[.,;:]*[\"'”)]*")  # beside marks that change nothing
WITH_UNIT = re.compile(rf"{NUMBER}(?: (?P<unit>[^\W\d_]{{2,}}(?: [^\W\d_]+)*))?\.?")
# Words that join the numbers beside them to one expression, and words that make another number of the one beside them.
JOINS = re.compile(r".*[-\\^√π=≈<>≤≥±×÷*/+~–—].*|and|or|to|by|x|times|plus|over", re.IGNORECASE)
BEFORE = r"not|than|least|most|up|under|below|above|twice|sqrt|log|ln|sin|cos|tan|(?:half|root|square|cube) of"
AFTER = r"(?:hundred|thousand|[mbt]r?illion|dozen|hal(?:f|ves)|thirds|quarters|fifths|tenths|squared|cubed|pi|[b-z])\b"
# Ends what is read as an answer: a sentence or line, an aside in parentheses, reasons.
ENDS = re.compile(r"\n|(?<=[.;!?])\s+|(?<=\S)\s+\((?=\D)|\b(?:because|since|as|so)\b", re.IGNORECASE)


def tidy(text: str) -> str:
    r"""The text with plain fractions and minus signs, without bold print and LaTeX's spaces and delimiters.

    >>> tidy(r"−\frac{1}{2} of \(1{,}234\), 1½, \text{in} **bold**, 2**3")
    '-1/2 of 1,234, 1 1/2,  in  "bold", 2**3'
    """
    for pattern, plain in (
        (r"[−–‒](?=[\d.$€£¥\\])|\b(?:negative|minus)\s+(?=[\d.$€£¥])", "-"),
        (r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r" \1 "),
        (r"(?<=\d)(?=\\[dt]?frac|[¼-¾⅐-⅞])", " "),
        (r"\\[dt]?frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))", r"\1\2/\3\4"),
        (r"[¼-¾⅐-⅞]", lambda match: unicodedata.normalize("NFKC", match[0]).replace("⁄", "/")),
        (r"\{,\}", ","),
        (r"\^\{?\\circ\}?", "°"),
        (r"\\([$%])", r"\1"),
        (r"\\[,;: ]", " "),
        (r"\\[()\[\]!]", ""),
        (r"`+|(?<![\w*])\*\*(?=[^\s*])|(?<=[^\s*])\*\*(?![\w*])", '"'),
        (r"(^|[=≈:])\s*-\s+(?=[\d.])", r"\1 -"),
    ):
        text = re.sub(pattern, plain, text, flags=re.IGNORECASE)
    return text.strip()


def value(number: str) -> Fraction | None:
    """The value of a number as it is written; None where it is none, as for a division that is still to be done.

    >>> [str(value(text)) for text in ("1,200.5", "-1 1/2", "2e3", "48/2", "1/0", "x")]
    ['2401/2', '-3/2', '2000', 'None', 'None', 'None']
    """
    whole, _, part = number.rpartition(" ") if re.search(r"\d \d+/", number) else ("0", "", number)
    try:
        whole, part = Fraction(re.sub("[ ,]", "", whole)), Fraction(re.sub("[ ,]", "", part))
    except (ValueError, ZeroDivisionError):
        return None
    todo = "/" in number and (part.denominator == 1 or (whole and part > 1))
    return None if todo else whole + (-part if whole < 0 else part)


def found(match: re.Match | None) -> str | None:
    """The number of a match, with its sign."""
    number = match and "-" * ("-" in match["sign"]) + match["number"].replace(" /", "/").replace("/ ", "/")
    return number if number and value(number) is not None else None


def golden_number(golden: str) -> tuple[str, str] | None:
    """The number and the unit of an answer that is one number as a whole; None where it is something else.

    >>> [golden_number(text) for text in ("$1,200", "42 apples", "-4.", "33.69°", "½")]
    [('1,200', ''), ('42', 'apples'), ('-4', ''), ('33.69', ''), ('1/2', '')]
    >>> [golden_number(text) for text in ("Friday", "3 h 20 min", "B2", "5 + 10i", "x^2", "2x", "3 million")]
    [None, None, None, None, None, None, None]
    """
    match = WITH_UNIT.fullmatch(tidy(golden))
    number, unit = found(match), ((match and match["unit"]) or "").casefold()
    return None if number is None or re.match(AFTER, unit) else (number, unit)


def stated_number(text: str, unit: str, last: bool) -> str | None:
    """The only number of a text's first sentence, or else the last number of its last sentence that has some.

    What follows 'The answer is' has to name one number; other sentences may calculate before they do.
    """
    sentences = [part for part in ENDS.split(tidy(text)) if (has_digit(part) if last else part.strip())]
    words = sentences[-1 if last else 0].split() if sentences else []
    runs = groupby(words, lambda word: has_digit(word) or JOINS.fullmatch(word) is not None)
    parts = ["", *(" ".join(run) for _, run in runs), ""]  # expressions, and the words between them
    numbers = [i for i, part in enumerate(parts) if has_digit(part)]
    if not numbers or (len(numbers) > 1 and not last):
        return None
    before, expression, after = parts[numbers[-1] - 1 : numbers[-1] + 2]
    if re.search(rf"\b(?:{BEFORE})$", before, re.IGNORECASE) or re.match(AFTER, after, re.IGNORECASE):
        return None
    if unit and not f"{after} ".casefold().startswith((unit, " ")):
        return None
    result = re.sub(r"^(?:(?:and|or|to|by)\s+)+", "", re.split("[=≈]", expression)[-1].strip())
    return found(ALONE.fullmatch(result))


def has_digit(text: str) -> bool:
    return any(map(str.isnumeric, text))


def final_answer(response: str, golden: str) -> str | None:
    """What a response gives as its answer: a number where the golden answer is one, else text; None if there is none.

    The last box counts, else what follows the last 'answer is', 'Answer:' or '####', else the end of the response. A
    text has as many lines as the golden one.
    """
    boxes, marks = BOXED.findall(response), list(MARKS.finditer(response))
    marked = bool(boxes or marks)
    lines = (boxes[-1] if boxes else response[marks[-1].end() :] if marks else response).strip().split("\n")
    if number := golden_number(golden):
        return stated_number(lines[0] if marked else "\n".join(lines), number[1], last=not marked)
    count = golden.count("\n") + 1
    return "\n".join(lines[:count] if marked else lines[-count:]).strip() or None


def variants(answer: str) -> list[str]:
    """A text as it is, without bold print or quotes around it, and without its full stop.

    >>> variants("**mother**.")
    ['**mother**.', 'mother.', 'mother']
    """
    around = r"""(?:\*\*|\\text(?:bf)?\{|["'`“])(.+?)(?:\*\*|\}|["'`”])(\.?)"""
    inner = re.sub(rf"^{around}$", r"\1\2", answer, flags=re.DOTALL)
    return list(dict.fromkeys(filter(None, (answer, inner, inner.removesuffix(".").rstrip()))))


def equal(answer: str, golden: str) -> bool:
    """Whether two answers are the same number, or else the same text but for case, spaces and a full stop."""
    if number := golden_number(golden):
        given = golden_number(answer)
        return given is not None and value(given[0]) == value(number[0])
    texts, goldens = ({" ".join(variant.casefold().split()) for variant in variants(text)} for text in (answer, golden))
    return not texts.isdisjoint(goldens)


def falsify(text: str, rng: random.Random) -> str:
    """The text with wrong results: every number after '=', or else the last number, gets another last digit.

    >>> falsify("7*8=6", random.Random(0))
    '7*8=7'
    """

    def another(match: re.Match) -> str:
        digit = match[0][-1]
        return match[0][:-1] + rng.choice([d for d in "0123456789" if d != digit])

    results = re.sub(r"(?<==)\s*-?\d+", another, text)
    return results if results != text else re.sub(r"\d+(?=\D*$)", another, text)
