"""Rollouts and their peers, reading a reflection, locating its quote, the masks, and the worked example."""

import dataclasses
import random

import pytest
import torch
from conftest import Letters, make_rollout, tiny_gpt

import reflect
from data import Task, Verdict, load_task
from harness.cli import run_script
from reflect import MASKS, Pair, Reflection, error_mask, locate, pair_with_peers, parse_reflection, true_position

TAGS = ("<error_quote>", "</error_quote>", "<explanation>", "</explanation>")


# ---------------------------------------------------------------------------------------------- rollouts, peers


def test_rollouts_of_a_problem_lie_side_by_side_with_the_verdict_of_their_own_text() -> None:
    task, generator = Letters(), torch.Generator().manual_seed(0)
    problems = task.problems("two", 5, random.Random(0))
    rollouts = reflect.sample_rollouts(tiny_gpt(task), task, problems, 3, generator)
    assert [y.problem for y in rollouts] == [problem for problem in problems for _ in range(3)]
    for y in rollouts:
        assert y.text == "".join(y.pieces).removesuffix("<end>") and len(y.pieces) == len(y.tokens) == len(y.logprobs)
        assert y.verdict == task.verify(y.problem, y.text)


def test_a_rollout_without_a_stop_token_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Letters()
    monkeypatch.setattr(Letters, "verify", lambda self, problem, text, ended: Verdict(ended, ended, None))
    rollouts = reflect.sample_rollouts(tiny_gpt(task), task, task.problems("one", 30, random.Random(0)), 1, None)
    assert [y.verdict.finished for y in rollouts] == [y.tokens[-1] == task.end() for y in rollouts]
    assert {y.verdict.finished for y in rollouts} == {True, False}


def test_peers_are_other_correct_rollouts_of_the_same_group() -> None:
    first, wrong, short = make_rollout("abc"), make_rollout("b"), make_rollout("a")
    alone, lost = make_rollout("da"), make_rollout("c")
    group = [first, wrong, short, alone, lost, lost]
    assert [pair.peer for pair in pair_with_peers(group, 3, "shortest")] == [short, short, first, None, alone, alone]
    assert [pair.peer for pair in pair_with_peers(group, 3, "first")] == [short, first, first, None, alone, alone]
    assert [pair.peer for pair in pair_with_peers([lost, lost], 2)] == [None, None]
    assert [pair.y for pair in pair_with_peers(group, 3)] == group


def test_advantages_are_rewards_less_the_mean_of_the_group() -> None:
    group = [make_rollout(text) for text in ("a", "b", "c", "d", "a", "a", "b", "b")]
    advantages = [pair.advantage for pair in pair_with_peers(group, 4)]
    assert advantages == [0.75, -0.25, -0.25, -0.25, 0.5, 0.5, -0.5, -0.5]


# ---------------------------------------------------------------------------------------------- writing, reading


def test_reflector_reads_a_wrong_rollout_beside_its_peer_and_a_right_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    task, read = Letters(), []
    wrong, right, peer = make_rollout("bc"), make_rollout("ba"), make_rollout("ad")
    pairs = [Pair(wrong, peer, 0.0), Pair(right, peer, 0.0), Pair(wrong, None, 0.0), Pair(wrong, peer, 0.0)]

    def write(reflector: None, prompts: list[list[int]], *_: object, **__: object) -> list[list[int]]:
        read.append(["".join(task.pieces(prompt)) for prompt in prompts])
        return [task.encode(f"<error_quote>c</error_quote><explanation>{i}</explanation>") for i in range(len(prompts))]

    monkeypatch.setattr(reflect, "generate", write)
    for temperature, ideas in ((0.0, "2012"), (1.0, "0123")):  # greedily, equal prompts are written once, in order
        for give_answer, answer in ((False, ""), (True, "a")):
            reflections = reflect.write_reflections(None, task, pairs, give_answer, temperature)
            prompts = [f"a0{answer}~bc~ad?", f"a0{answer}~ba~?", f"a0{answer}~bc~a?", f"a0{answer}~bc~ad?"]
            assert read.pop() == (prompts if temperature else sorted(set(prompts)))
            assert [reflection.idea for reflection in reflections] == list(ideas)
            assert {reflection.quote for reflection in reflections} == {"c"}


@pytest.mark.parametrize(
    ("text", "quote", "idea"),
    [
        ("<error_quote>6*2=8</error_quote><explanation>6*2=2</explanation>", "6*2=8", "6*2=2"),
        ("1-5=6:6<error_quote>q</error_quote>;<explanation>e</explanation>1", "q", "e"),
        ("<explanation>e</explanation><error_quote>q</error_quote>", "q", "e"),
        ("<error_quote>q\nr</error_quote><explanation>e\nf</explanation>", "q\nr", "e\nf"),
        ("<error_quote>q</error_quote>", "q", None),
        ("<error_quote>q<explanation>e</explanation>", None, "e"),
        ("<error_quote>q</error_quote><explanation>e", "q", None),
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
    ("quote", "pieces", "span"),
    [
        ("c", ["a", "b", "c"], (2, 3)),
        ("bc", ["a", "b", "c", "d"], (1, 3)),
        ("cd", ["ab", "cde", "f"], (1, 2)),
        ("de", ["ab", "cde", "f"], (1, 2)),  # begins inside a token
        ("ef", ["ab", "cde", "f"], (1, 3)),  # begins inside one and ends in the next
        ("ab", ["x", "ab", "y", "ab"], (1, 2)),  # occurs twice
        ("b", ["a", "", "b"], (2, 3)),  # the second token continues a character of the first
        ("本 costs", ["a", "本", "", "", " costs", "<end>"], (1, 5)),  # k holds its first byte
        ("本", ["a", "本", "", "", "b"], (1, 4)),  # and the tokens of its other bytes belong to it
        ("a本", ["a", "本", "", ""], (0, 3)),  # but the stop token, which has no text either, does not
        (" bc ", ["a", "b", "c", "d"], (1, 3)),  # as in the released code, without the white space around it
        (" b", ["b", " b"], (1, 2)),  # but as it is, where it occurs as it is
        ("abc", ["a", "b"], None),
        ("ba", ["a", "b"], None),
        ("  ", ["a", "b"], None),
        ("", ["a", "b"], None),
        (None, ["a", "b"], None),
        ("a", [], None),
    ],
)
def test_quote_is_located_at_the_tokens_that_hold_its_first_occurrence(
    quote: str | None, pieces: list[str], span: tuple[int, int] | None
) -> None:
    assert locate(quote, pieces) == span


def test_random_bytes_are_read_and_located_without_exception() -> None:
    rng = random.Random(2)
    for i in range(5_000):
        parts = [rng.randbytes(rng.randrange(12)) for _ in range(rng.randrange(6))]
        if i % 2:
            parts = [part for text in parts for part in (text, rng.choice(TAGS).encode())]
        pieces = [part.decode("latin-1" if i % 4 < 2 else "utf-8", errors="replace") for part in parts]
        read, rollout = parse_reflection("".join(pieces)), rng.sample(pieces, len(pieces))
        assert read.quote != "" and read.idea != ""
        span, forms = locate(read.quote, rollout), {read.quote or "", (read.quote or "").strip()} - {""}
        assert (span is not None) == any(form in "".join(rollout) for form in forms)
        assert span is None or any(form in "".join(rollout[slice(*span)]) for form in forms)


@pytest.mark.parametrize("task", [Letters(), load_task("arithmetic")], ids=lambda task: type(task).__name__)
def test_random_tokens_are_verified_read_and_located_without_exception(task: Task) -> None:
    rng = random.Random(3)
    for _ in range(300):
        problem = task.problem(rng.choice(task.domains), rng)
        tokens = [rng.randrange(task.vocab_size) for _ in range(1 + rng.randrange(40))]
        text, pieces = task.decode(tokens), task.pieces(tokens)
        y = reflect.Rollout(problem, tokens, [0.0] * len(tokens), text, pieces, task.verify(problem, text))
        assert 0 <= true_position(y) <= len(tokens)
        read = parse_reflection(text)
        span = locate(read.quote, pieces)
        assert span is None or 0 <= span[0] < span[1] <= len(tokens)
        task.encode(task.prompt(problem, read.idea, problem.solution))


# ---------------------------------------------------------------------------------------------- masks


def test_true_position_is_the_token_where_the_verifiers_error_begins() -> None:
    y = dataclasses.replace(make_rollout("b!cd"), pieces=["b", "!c", "d", "<end>"])
    for error, k in (((0, 1), 0), ((1, 2), 1), ((2, 5), 1), ((3, 4), 2), (None, 0)):
        assert true_position(dataclasses.replace(y, verdict=Verdict(False, True, error))) == k


@pytest.mark.parametrize(
    ("mask", "found", "not_found"),
    [("whole", (0, 6), (0, 6)), ("suffix", (2, 6), (0, 6)), ("span", (2, 4), (0, 6)), ("oracle", (3, 6), (3, 6))],
)
def test_mask_covers_what_it_names_and_the_whole_response_if_the_quote_is_not_found(
    mask: str, found: tuple[int, int], not_found: tuple[int, int]
) -> None:
    y = dataclasses.replace(make_rollout("bcdbc"), verdict=Verdict(False, True, (3, 5)))
    assert MASKS[mask].bounds(y, (2, 4)) == found
    assert MASKS[mask].bounds(y, None) == not_found


def test_error_mask_is_one_from_each_start_to_each_end() -> None:
    mask = error_mask([0, 2, 3, 1], [2, 4, 3, 2], T=4)
    assert torch.equal(mask, torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]))


# ---------------------------------------------------------------------------------------------- worked example


def test_the_worked_example_runs_on_any_task(
    letters: Letters, base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["reflect.py", "--base", base, "--domain", "one"])
    run_script(reflect.main)
    printed = capsys.readouterr().out
    assert "wrong rollout y-" in printed and ("m_t" in printed or "malformed" in printed)
