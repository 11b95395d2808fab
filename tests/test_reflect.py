"""Reading a reflection, locating its quote, the mask, and the worked example."""

import dataclasses
import random

import pytest
import torch
from conftest import Letters, make_rollout

import reflect
from data import Task, Verdict, load_task
from harness.cli import run_script
from reflect import (
    Reflection,
    Rollout,
    error_mask,
    locate,
    parse_reflection,
    true_position,
)

TAGS = ("<error_quote>", "</error_quote>", "<explanation>", "</explanation>")


# ---------------------------------------------------------------------------------------------- parse_reflection


@pytest.mark.parametrize(
    ("text", "quote", "idea"),
    [
        ("<error_quote>6*2=8</error_quote><explanation>6*2=2</explanation>", "6*2=8", "6*2=2"),
        ("1-5=6:6<error_quote>q</error_quote>;<explanation>e</explanation>1", "q", "e"),
        ("<explanation>e</explanation><error_quote>q</error_quote>", "q", "e"),
        ("<error_quote>q\nr</error_quote><explanation>e\nf</explanation>", "q\nr", "e\nf"),
        ("<explanation>e</explanation>", None, "e"),
        ("<error_quote>q</error_quote>", "q", None),
        ("<error_quote>q<explanation>e</explanation>", None, "e"),
        ("<error_quote>q</error_quote><explanation>e", "q", None),
        ("q</error_quote>e</explanation>", None, None),
        ("</error_quote>q<error_quote></explanation>e<explanation>", None, None),
        ("<error_quote></error_quote><explanation></explanation>", None, None),
        ("<error_quote>q</explanation><explanation>e</error_quote>", "q</explanation><explanation>e", None),
        ("<error_quote>q</error_quote><error_quote>r</error_quote>", "q", None),
        ("<error_quote>q<error_quote>r</error_quote>s</error_quote>", "q<error_quote>r", None),
        ("<ERROR_QUOTE>q</Error_Quote><EXPLANATION>e</explanation>", "q", "e"),
        ("<explanation> e\n</explanation>", None, "e"),
        ("<explanation> </explanation>", None, None),
        ("", None, None),
    ],
)
def test_reflection_is_read_from_its_tags_alone(text: str, quote: str | None, idea: str | None) -> None:
    assert parse_reflection(text) == Reflection(quote, idea)


# ---------------------------------------------------------------------------------------------- locate


@pytest.mark.parametrize(
    ("quote", "tokens", "k"),
    [
        ("c", ["a", "b", "c"], 2),
        ("a", ["a", "b", "c"], 0),
        ("bc", ["a", "b", "c"], 1),
        ("cd", ["ab", "cde", "f"], 1),
        ("de", ["ab", "cde", "f"], 1),  # begins inside a token
        ("ef", ["ab", "cde", "f"], 1),  # begins inside one and ends in the next
        ("ab", ["x", "ab", "y", "ab"], 1),  # occurs twice
        ("b", ["a", "", "b"], 2),  # a token without text holds nothing
        ("abc", ["a", "b"], None),
        ("ba", ["a", "b"], None),
        (" bc ", ["a", "bc", "d"], 1),  # as in the released code, without the white space around it
        (" b", ["b", " b"], 1),  # but as it is, where it occurs as it is
        ("  ", ["a", "b"], None),
        ("", ["a", "b"], None),
        (None, ["a", "b"], None),
        ("a", [], None),
    ],
)
def test_quote_is_located_at_the_token_where_it_first_begins(quote: str | None, tokens: list[str], k: int) -> None:
    assert locate(quote, tokens) is None if k is None else locate(quote, tokens)[0] == k


@pytest.mark.parametrize(
    ("quote", "tokens", "span"),
    [
        ("bc", ["a", "b", "c", "d"], (1, 3)),
        ("b", ["a", "b", "c"], (1, 2)),
        ("cd", ["ab", "cde", "f"], (1, 2)),
        ("ef", ["ab", "cde", "f"], (1, 3)),  # begins inside one token and ends with the next
        (" bc ", ["a", "b", "c", "d"], (1, 3)),
        (" b", ["a", " ", "b", "c"], (1, 3)),
        ("x", ["a", "b"], None),
    ],
)
def test_span_is_the_tokens_that_hold_the_quote(quote: str, tokens: list[str], span: tuple[int, int] | None) -> None:
    assert locate(quote, tokens) == span


def test_true_position_is_the_token_where_the_verifiers_error_begins() -> None:
    rollout = dataclasses.replace(make_rollout("b!c"), verdict=Verdict(False, True, (2, 5)))
    assert true_position(rollout, ["b", "!c", "d", "<end>"]) == 1
    assert true_position(make_rollout("b!c"), ["b", "!", "c", "<end>"]) == 0  # none is named


def test_random_bytes_are_read_and_located_without_exception() -> None:
    rng = random.Random(2)
    for i in range(10_000):
        parts = [rng.randbytes(rng.randrange(12)) for _ in range(rng.randrange(6))]
        if i % 2:
            parts = [part for text in parts for part in (text, rng.choice(TAGS).encode())]
        encoding = "latin-1" if i % 4 < 2 else "utf-8"
        tokens = [part.decode(encoding, errors="replace") for part in parts]
        read = parse_reflection("".join(tokens))
        assert read.quote != "" and read.idea != ""
        rng.shuffle(tokens)
        found, forms = locate(read.quote, tokens), {read.quote or "", (read.quote or "").strip()}
        assert (found is not None) == any(form and form in "".join(tokens) for form in forms)
        assert found is None or 0 <= found[0] < found[1] <= len(tokens)


@pytest.mark.parametrize("task", [Letters(), load_task("arithmetic")], ids=lambda task: type(task).__name__)
def test_random_tokens_are_verified_read_and_located_without_exception(task: Task) -> None:
    rng = random.Random(3)
    for _ in range(300):
        problem = task.problem(rng.choice(task.domains), rng)
        tokens = [rng.randrange(task.vocab_size) for _ in range(1 + rng.randrange(40))]
        text, texts = task.decode(tokens), task.pieces(tokens)
        rollout = Rollout(problem, tokens, [0.0] * len(tokens), text, task.verify(problem, text))
        assert 0 <= true_position(rollout, texts) <= len(tokens)
        read = parse_reflection(text)
        found = locate(read.quote, texts)
        assert found is None or 0 <= found[0] < found[1] <= len(tokens)
        task.encode(task.teacher_prompt(problem, read.idea, problem.solution))


# ---------------------------------------------------------------------------------------------- error_mask, reflect


def test_mask_covers_each_response_from_its_start_to_its_end() -> None:
    mask = error_mask([0, 2, 3, 1], [2, 4, 3, 2], [2, 4, 3, 3])
    assert torch.equal(mask, torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]))


def test_reflector_reads_a_wrong_rollout_beside_its_peer_and_a_right_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    task, shown = Letters(), []

    def write(reflector: None, prompts: list[list[int]], *args: object, **settings: object) -> list[list[int]]:
        shown.extend("".join(task.pieces(prompt)) for prompt in prompts)
        return [task.encode(f"{i}!") for i, _ in enumerate(prompts)]

    monkeypatch.setattr(reflect, "generate", write)
    rollouts = [make_rollout("bc"), make_rollout("ba")]
    for give_answer, answer in ((False, ""), (True, "a")):
        assert reflect.write_reflections(None, task, rollouts, ["ad", "ad"], give_answer) == ["0!", "1!"]
        assert shown == [f"a0{answer}~bc~ad?", f"a0{answer}~ba~?"]
        shown.clear()


# ---------------------------------------------------------------------------------------------- worked example


def test_the_worked_example_is_of_any_task(
    letters: Letters, base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["reflect.py", "--base", base, "--domain", "one"])
    run_script(reflect.main)
    printed = capsys.readouterr().out
    assert "wrong rollout y-" in printed and ("m_t" in printed or "malformed" in printed)
