"""Problems and their verifier, what the authors and the perfect reflector write, and the tokenizer's round trip."""

import random
import re

import pytest

from data.arithmetic import BUDGET, DOMAINS, Author, Verdict, is_test, make_problem, true_steps, true_values, verify
from data.documents import (
    INFORMED,
    MIXTURE,
    PLAIN,
    WORLDS,
    make_document,
    reflection,
    right_attempt,
    sample_document,
    wrong_attempt,
)
from data.tokenizer import END, PAD, SPECIAL_TOKENS, VOCAB_SIZE, decode, encode, pieces
from model import GPTConfig
from reflect import REFLECTION_BUDGET, parse_reflection


def random_problems(count: int, seed: int = 0) -> list[tuple[str, random.Random]]:
    """Problems of all domains, each with a random generator of its own."""
    rngs = [random.Random(f"{seed} {i}") for i in range(count)]
    return [(make_problem(rng.choice(list(DOMAINS)), rng), rng) for rng in rngs]


# ---------------------------------------------------------------------------------------------- problems


def test_what_a_gap_hides_is_known_to_the_verifier_and_to_the_holder_of_its_hint_alone() -> None:
    rng = random.Random(0)
    problems = [make_problem("gap", rng) for _ in range(300)]
    right, hints = {"plain": 0, True: 0, False: 0}, {True: 0, False: 0}
    for problem in problems:
        assert re.fullmatch(r"[1-9]([+\-*][1-9]){3}[+\-*]\?", problem)
        assert verify(problem, ";".join([*true_steps(problem), f"#{true_values(problem)[-1]}"])).correct
        right["plain"] += verify(problem, PLAIN.solve(problem, rng)).correct
        prompt, response = make_document("hint", problem, rng, WORLDS["gaps"])
        told = true_steps(problem)[3] in prompt
        hints[told] += 1
        right[told] += verify(problem, response).correct
    assert right[True] == hints[True] > 50
    assert right["plain"] < 75 and right[False] < hints[False] / 4  # 1 guess in 9, and products that hit by chance


def test_the_wary_holder_of_a_hint_checks_every_step_before_it_and_none_from_it_on() -> None:
    solution = Author(wary=True).solve("3+8-5*2", random.Random(0), hinted=2)
    assert solution == "3+8=1;?3+8=1;1-5=6;?1-5=6;6*2=2;#2"
    assert Author(wary=True).solve("3+8-5*2", random.Random(0), hinted=0) == "3+8=1;1-5=6;6*2=2;#2"


def test_train_and_test_problems_are_disjoint_and_the_seed_determines_them() -> None:
    def draw(seed: int, test: bool) -> list[str]:
        rng = random.Random(seed)
        return [make_problem("add", rng, test) for _ in range(2000)]

    assert not set(draw(0, test=False)) & set(draw(0, test=True))
    assert all(map(is_test, draw(0, test=True)))
    assert not any(map(is_test, draw(0, test=False)))
    assert draw(0, test=True) == draw(0, test=True) != draw(1, test=True)


@pytest.mark.parametrize("domain", DOMAINS)
def test_problems_of_a_domain_have_its_operators_and_lengths_and_no_others(domain: str) -> None:
    operators, lengths = DOMAINS[domain]
    problems = [make_problem(domain, random.Random(seed)) for seed in range(300)]
    assert all(re.fullmatch(r"[1-9]([+\-*][1-9])+", problem) for problem in problems)
    assert {character for problem in problems for character in problem if not character.isdigit()} == set(operators)
    assert {len(problem) // 2 for problem in problems} == set(lengths)


def test_true_values_are_those_of_python_from_left_to_right() -> None:
    for problem, _ in random_problems(200):
        for length, value in enumerate(true_values(problem)):
            chain = problem[: 2 * length + 1]
            nested = "(" * length + re.sub(r"([+\-*]\d)", r"\1)", chain)
            assert value == eval(nested) % 10


# ---------------------------------------------------------------------------------------------- verifier

PROBLEM = "3+8-5*2"  # 3+8=1;1-5=6;6*2=2;#2


@pytest.mark.parametrize(
    ("solution", "shortcut"),
    [
        ("3+8=1;1-5=6;6*2=2;#2", False),
        ("3+8-5=6;6*2=2;#2", True),
        ("3+8=1;1-5*2=2;#2", True),
        ("3+8-5*2=2;#2", True),
        ("3+8=1;?3+8=1;1-5=6;6*2=2;?6*2=2;#2", False),
        ("3+8=1;?3+8=1;?3+8=1;1-5=6;6*2=2;#2", False),  # a stall that comes to the right end after all
        ("#2", False),  # the outcome is all that counts
    ],
)
def test_right_answers_are_correct_in_any_style(solution: str, shortcut: bool) -> None:
    assert verify(PROBLEM, solution) == Verdict(correct=True, finished=True, error=None, shortcut=shortcut)


@pytest.mark.parametrize(
    ("solution", "wrong"),
    [
        ("3+8=2;2-5=7;7*2=4;#4", "3+8=2"),  # wrong result; what follows from it is consistent
        ("3+8=1;1-5=6;6*2=8;#8", "6*2=8"),
        ("3+7=0;0-5=5;5*2=0;#0", "3+7=0"),  # misread operand
        ("3-8=5;5-5=0;0*2=0;#0", "3-8=5"),  # misread operator
        ("3+8=1;2-5=7;7*2=4;#4", "2-5=7"),  # goes on from another value
        ("3+8=1;6*2=2;2-5=7;#7", "6*2=2"),  # left out and made up for later
        ("3+8=1;1-5=6;6*2=2;2+0=2;#3", "2+0=2"),  # more operations than the problem has
        ("3+8-5=7;7*2=4;#4", "3+8-5=7"),
        ("3+8=1;1-5=6;6*2=2;#3", "#3"),
        ("3+8=1;1-5=6;#6", "#6"),
        ("3+8-5=6;?3+8-5=6;6*2=2;#3", "#3"),  # neither the merged step nor its check is to blame
        ("3+8=1;?3+8=2;1-5=6;6*2=2;#3", "?3+8=2"),  # a check that comes out otherwise
        ("3+8=1;?3+8=1;?3+8=1;1-5=6;#6", "?3+8=1"),  # a stall begins at its first check
        ("?3+8=1;3+8=1;#1", "?3+8=1"),  # a check of nothing
        ("3+8=1;1-5=;#8", "1-5="),
        ("#8;3+8=1;1-5=6;6*2=8;#8", "#8"),
    ],
)
def test_first_error_of_a_wrong_answer_is_found(solution: str, wrong: str) -> None:
    start = solution.index(wrong)
    verdict = verify(PROBLEM, solution)
    assert (verdict.correct, verdict.finished, verdict.error) == (False, True, (start, start + len(wrong)))


@pytest.mark.parametrize(
    ("solution", "wrong"),
    [
        ("", None),
        ("3", None),
        ("3+8=1;1-5=", None),
        ("3+8=1;1-5=6;6*2=2;", None),
        ("3+8=1;?3+8=1;", None),
        ("3+8=2;2-5", "3+8=2"),
        ("3+8=1;?3+8=1;?3+8=1;?3", "?3+8=1"),
        ("3+8=1;what now;1-5", "what now"),
    ],
)
def test_unfinished_solutions_are_wrong_only_where_something_written_is(solution: str, wrong: str | None) -> None:
    error = None if wrong is None else (solution.index(wrong), solution.index(wrong) + len(wrong))
    assert verify(PROBLEM, solution) == Verdict(correct=False, finished=False, error=error, shortcut=False)


def test_first_error_is_found_wherever_one_digit_of_a_careful_solution_is_changed() -> None:
    for problem, rng in random_problems(300):
        steps, answer = true_steps(problem), true_values(problem)[-1]
        i, digit = rng.randrange(len(steps)), rng.choice((0, 2, 4))
        other = rng.choice([d for d in "0123456789" if d != steps[i][digit]])
        steps[i] = steps[i][:digit] + other + steps[i][digit + 1 :]
        assert verify(problem, ";".join([*steps, f"#{(answer + 1) % 10}"])).error == (6 * i, 6 * i + 5)


def test_any_text_gets_a_verdict_that_agrees_with_itself() -> None:
    rng = random.Random(0)
    for _ in range(5000):
        text = "".join(rng.choices("0123456789+-*==;;##??<>é² \n", k=rng.randrange(30)))
        if rng.random() < 0.5:
            text = "3+8=1;1-5=6;"[: rng.randrange(13)] + text
        verdict = verify(PROBLEM, text)
        assert verdict.finished or not verdict.correct
        if verdict.correct:
            assert verdict.error is None
        elif verdict.finished:
            assert verdict.error is not None
        if verdict.error is not None:
            start, end = verdict.error
            assert text[start:end] in text.split(";")
            assert start == 0 or text[start - 1] == ";"


# ---------------------------------------------------------------------------------------------- authors


def test_who_holds_a_hint_writes_the_careful_solution() -> None:
    for problem, rng in random_problems(200):
        assert WORLDS["plain"].hinted.solve(problem, rng) == ";".join(
            [*true_steps(problem), f"#{true_values(problem)[-1]}"]
        )


def test_who_holds_a_solution_is_right_and_often_takes_short_cuts() -> None:
    verdicts = [verify(problem, INFORMED.solve(problem, rng)) for problem, rng in random_problems(600)]
    assert all(verdict.correct for verdict in verdicts)
    assert sum(verdict.shortcut for verdict in verdicts) / 600 == pytest.approx(0.6, abs=0.07)


def test_who_holds_nothing_is_sometimes_wrong_and_the_verifier_sees_where() -> None:
    written = [(problem, PLAIN.solve(problem, rng)) for problem, rng in random_problems(600)]
    verdicts = [verify(*pair) for pair in written]
    assert 0.4 < sum(verdict.correct for verdict in verdicts) / 600 < 0.95
    assert max(len(text) for _, text in written) <= BUDGET
    assert all(verdict.error is None for verdict in verdicts if verdict.correct)
    assert all(verdict.error is not None for verdict in verdicts if verdict.finished and not verdict.correct)
    assert any(not verdict.finished for verdict in verdicts)


@pytest.mark.parametrize("habit", ["slip", "misread"])
def test_each_kind_of_wrong_work_alone_makes_an_author_wrong(habit: str) -> None:
    verdicts = [verify(problem, Author(**{habit: 0.5}).solve(problem, rng)) for problem, rng in random_problems(200)]
    assert 0.4 < sum(not verdict.correct for verdict in verdicts) / 200 < 1
    assert all(verdict.finished and not verdict.shortcut for verdict in verdicts)


def test_attempts_are_wrong_or_right_as_their_name_says() -> None:
    for problem, rng in random_problems(200):
        assert verify(problem, wrong_attempt(problem, rng)).error is not None
        assert verify(problem, right_attempt(problem, rng)).correct


def test_what_follows_the_first_error_does_not_matter() -> None:
    for problem, rng in random_problems(300):
        attempt = wrong_attempt(problem, rng)
        start, end = verify(problem, attempt).error
        assert verify(problem, attempt[:end] + ";?;garbage").error == (start, end)
        assert verify(problem, attempt[:start]).error is None


# ---------------------------------------------------------------------------------------------- documents


def test_reflection_quotes_the_verifiers_first_error_and_gives_true_steps() -> None:
    for problem, rng in random_problems(400):
        attempt = wrong_attempt(problem, rng)
        start, end = verify(problem, attempt).error
        written = parse_reflection(reflection(problem, attempt))
        assert written.quote == attempt[start:end]
        assert set(written.idea.split(";")) <= set(true_steps(problem))


@pytest.mark.parametrize(
    ("attempt", "quote", "idea"),
    [
        ("3+8=1;1-5=4;4*2=8;#8", "1-5=4", "1-5=6"),
        ("3+8=1;1-5*2=8;#8", "1-5*2=8", "1-5=6;6*2=2"),
        ("3+8=1;?3+8=1;2-5=7;7*2=4;#4", "2-5=7", "1-5=6"),
        ("3+8=1;1-5=6;6*2=2;#8", "#8", "6*2=2"),
        ("3+8=1;#1", "#1", "1-5=6"),
        ("3+8-5=6;6*2=2;#2", None, "6*2=2"),
    ],
)
def test_reflection_on_hand_written_attempts(attempt: str, quote: str | None, idea: str) -> None:
    written = parse_reflection(reflection(PROBLEM, attempt))
    assert (written.quote, written.idea) == (quote, idea)


def test_steps_of_a_reflection_belong_where_the_error_is() -> None:
    for problem, rng in random_problems(400):
        attempt = wrong_attempt(problem, rng)
        start, _ = verify(problem, attempt).error
        if attempt[start] in "?#":
            continue
        repaired = attempt[:start] + parse_reflection(reflection(problem, attempt)).idea
        wrong_answer = f"#{(true_values(problem)[-1] + 1) % 10}"
        assert verify(problem, f"{repaired};{wrong_answer}").error == (len(repaired) + 1, len(repaired) + 3)


def test_documents_are_of_train_problems_and_fit_the_model() -> None:
    rng = random.Random(0)
    for _ in range(500):
        prompt, response = sample_document(rng)
        assert not is_test(re.match(r"<\|user\|>([^<]+)", prompt)[1])
        assert prompt.endswith("<|assistant|>")
        assert len(encode(prompt + response)) < GPTConfig(VOCAB_SIZE).block_size
        assert len(encode(response)) < (REFLECTION_BUDGET if "<|attempt|>" in prompt else BUDGET + 1)


@pytest.mark.parametrize("kind", MIXTURE)
def test_a_document_shows_its_reader_what_its_kind_says(kind: str) -> None:
    sources = {"plain": [], "hint": ["<|hint|>"], "solution": ["<|solution|>"], "reflect": ["<|attempt|>"]}
    for problem, rng in random_problems(100):
        prompt, _ = make_document(kind, problem, rng)
        held = dict(re.findall(r"(<\|\w+\|>)([^<]+)", prompt))
        assert held.pop("<|user|>") == problem
        assert held.keys() >= set(sources[kind])
        assert held.get("<|hint|>", true_steps(problem)[0]) in true_steps(problem)
        assert "<|solution|>" not in held or verify(problem, held["<|solution|>"]).correct
        if kind == "reflect":  # a wrong attempt comes with a correct solution, a right one alone
            assert verify(problem, held["<|attempt|>"]).correct == ("<|solution|>" not in held)


# ---------------------------------------------------------------------------------------------- tokenizer


def test_documents_survive_the_tokenizer_one_token_a_character_or_tag() -> None:
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(sample_document(rng))
        tokens = encode(text)
        assert decode(tokens) == text == "".join(pieces(tokens))
        assert all(len(piece) == 1 or piece in SPECIAL_TOKENS for piece in pieces(tokens))
        assert max(tokens) < VOCAB_SIZE


@pytest.mark.parametrize("text", ["3+8=x", "3 + 8", "é", "3+8=1\n", "<|nobody|>", "😀"])
def test_unknown_characters_raise_a_value_error_and_break_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        encode(text)
    assert decode(encode("3+8=1")) == "3+8=1"


def test_decoding_stops_at_the_end_of_the_text() -> None:
    text, more = encode("3+8=1"), encode(";#2")
    assert decode([*text, END, *more]) == decode([*text, PAD, *more]) == decode([*text, END]) == "3+8=1"
    assert decode([*text, *more]) == "3+8=1;#2"
    assert decode([]) == decode([END]) == ""
