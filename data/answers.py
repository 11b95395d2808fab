"""Find and compare final answers in text: numbers whatever is written around them, or words.

>>> final_answer("6 * 7 = 42. So the answer is **$42.00**.", "42"), final_answer("Answer: 48/2", "24")
('42.00', '48/2')
>>> equal("42.00", "$42"), equal("1/2", "0.5"), equal("48/2", "24")  # the last division is still to be done
(True, True, False)
"""

import random
import re
from fractions import Fraction

MARK = "The answer is"  # before the answer in golden solutions, and where a prompt asks for it

NUMBER = r"(?:(?<![\w)\]])-)?(?<![\w.])(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,2}(?!\d)|\s?/\s?\d+)?"
MARKS = re.compile(r"answer\W{0,3}\s*(?:is\b:?|:|=)|####", re.IGNORECASE)
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")


def tidy(text: str) -> str:
    """The text without LaTeX, currency, bold print and commas in numbers; with plain minus signs.

    >>> tidy(r"−\\frac{1}{2} of \\$1,234{,}567 in **bold**, 1,2,3")
    '-1/2 of 1234567 in bold, 1,2,3'
    """
    text = text.replace("−", "-").replace("{,}", ",")
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"[$€£¥]|\*\*|\\[a-z]*", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.sub(r"(^|[=:])\s*-\s+(?=[\d.])", r"\1 -", text)


def number_of(golden: str) -> str | None:
    """The number of an answer that is one number, perhaps with a unit; None where it is something else.

    >>> [number_of(text) for text in ("$1,200", "42 apples", "-4.", "33.69°", "Friday", "3 h 20 min", "B2", "5 + 10i")]
    ['1200', '42', '-4', '33.69', None, None, None, None]
    """
    found = re.fullmatch(rf"\D*?({NUMBER})\D*", tidy(golden))
    return found[1] if found else None


def final_answer(response: str, golden: str) -> str | None:
    """What a response gives as its answer: a number where the golden answer is one, else words; None if there is none.

    The last box counts, else what follows the last 'answer is', 'Answer:' or '####', else the last number or line.
    """
    boxes, marks = BOXED.findall(response), list(MARKS.finditer(response))
    tail = boxes[-1].strip() if boxes else response[marks[-1].end() :].strip(" \t\n*") if marks else ""
    first_line = tail.partition("\n")[0].strip()
    if number_of(golden) is None:
        if "\n" in golden:
            return tail or response.strip() or None
        return first_line or response.strip().rpartition("\n")[2].strip() or None
    given = re.findall(NUMBER, tidy(first_line).rpartition("=")[2])
    return given[0] if given else (re.findall(NUMBER, tidy(response)) or [None])[-1]


def value(text: str) -> Fraction | None:
    """The number a text is; None where it is none, like a division that has not been carried out."""
    try:
        number = Fraction(text.replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        return None
    return None if "/" in text and number.denominator == 1 else number


def equal(answer: str, golden: str) -> bool:
    """Whether two answers are the same number, or else the same words."""
    number = value(number_of(golden) or "")
    return bare(answer) == bare(golden) or (number is not None and number == value(answer))


def bare(text: str) -> str:
    """Words without case and without marks around them."""
    return text.strip(" \t\n.,:;!?*\"'()[]").casefold()


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
