"""Problems and their verifier, what the authors and the perfect reflector write, the task, and the tokenizer."""

import random
import re
from collections import Counter

import pytest

from data import Problem, load_task
from data.arithmetic import Arithmetic
from data.authors import CONFIRMED, HINTED, INFORMED, PLAIN, Author
from data.chains import (
    BUDGET,
    DOMAINS,
    calculate,
    disputed_steps,
    golden_solution,
    is_test,
    make_problem,
    popular,
    true_steps,
    true_values,
    verify,
)
from data.documents import (
    MIXTURE,
    confirmation,
    make_document,
    reflection,
    right_attempt,
    sample_document,
    wrong_attempt,
)
from data.prompts import reflect_prompt
from data.task import Verdict
from data.tokenizer import END, SPECIAL_TOKENS, VOCAB_SIZE, decode, encode, pieces
from reflect import parse_reflection

FACTS = [(a, operator, b) for a in range(10) for operator in "+-*" for b in range(1, 10)]


def random_problems(count: int, seed: int = 0) -> list[tuple[str, random.Random]]:
    rng = random.Random(seed)
    return [(make_problem(rng.choice(list(DOMAINS)), rng), rng) for _ in range(count)]


# ---------------------------------------------------------------------------------------------- problems and facts


def test_train_and_test_problems_are_disjoint_and_the_seed_determines_them() -> None:
    def draw(seed: int, test: bool) -> list[str]:
        rng = random.Random(seed)
        return [make_problem("add", rng, test) for _ in range(2000)]

    assert not set(draw(0, test=False)) & set(draw(0, test=True))
    assert all(map(is_test, draw(0, test=True))) and not any(map(is_test, draw(0, test=False)))
    assert draw(0, test=True) == draw(0, test=True) != draw(1, test=True)


@pytest.mark.parametrize("domain", DOMAINS)
def test_problems_of_a_domain_have_its_operators_and_lengths_and_no_others(domain: str) -> None:
    operators, lengths = DOMAINS[domain]
    problems = [make_problem(domain, random.Random(seed)) for seed in range(300)]
    mark = "!" if domain == "exam" else ""
    assert all(re.fullmatch(rf"[1-9]([+\-*][1-9])+{mark}", problem) for problem in problems)
    used = {character for problem in problems for character in problem if not character.isdigit()}
    assert used == {*operators, *mark}
    assert {len(problem.removesuffix("!")) // 2 for problem in problems} == set(lengths)


def test_true_values_are_those_of_python_from_left_to_right() -> None:
    for problem, _ in random_problems(200):
        for length, value in enumerate(true_values(problem)):
            nested = "(" * length + re.sub(r"([+\-*]\d)", r"\1)", problem[: 2 * length + 1])
            assert value == eval(nested) % 10


def test_a_quarter_of_the_pairs_of_digits_is_disputed_under_every_operator() -> None:
    disputed = {(a, b) for a, operator, b in FACTS if popular(a, operator, b) is not None}
    assert 0.15 < len(disputed) / 90 < 0.35
    assert all(popular(a, operator, b) is not None for a, b in disputed for operator in "+-*")
    assert all(popular(*fact) != calculate(*fact) for fact in FACTS)


def test_schools_take_each_disputed_fact_either_way_and_agree_about_all_others() -> None:
    for fact in FACTS:
        held = Counter(calculate(*fact, school=str(school)) for school in range(200))
        if popular(*fact) is None:
            assert set(held) == {calculate(*fact)}
        else:
            assert set(held) == {calculate(*fact), popular(*fact)} and min(held.values()) > 60


# ---------------------------------------------------------------------------------------------- verifier

PROBLEM = "3+8-5*2"  # 3+8=1;1-5=6;6*2=2;#2


@pytest.mark.parametrize(
    ("solution", "habits"),
    [
        ("3+8=1;1-5=6;6*2=2;#2", ()),
        ("3+8-5=6;6*2=2;#2", ("merged",)),
        ("3+8=1;1-5*2=2;#2", ("merged",)),
        ("3+8=1;?3+8=1;1-5=6;6*2=2;#2", ("checked",)),
        ("3+8-5=6;?3+8-5=6;6*2=2;#2", ("merged", "checked")),
        ("3+8=7;7-5=2;6*2=2;#2", ()),
        ("#2", ()),  # the outcome is all that counts
    ],
)
def test_right_answers_are_correct_in_any_style(solution: str, habits: tuple[str, ...]) -> None:
    assert verify(PROBLEM, solution) == Verdict(correct=True, finished=True, error=None, habits=habits)


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
        ("3+8=1;what now;1-5", "what now"),
    ],
)
def test_unfinished_solutions_are_wrong_only_where_something_written_is(solution: str, wrong: str | None) -> None:
    error = None if wrong is None else (solution.index(wrong), solution.index(wrong) + len(wrong))
    verdict = verify(PROBLEM, solution)
    assert (verdict.correct, verdict.finished, verdict.error) == (False, False, error)


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
        assert (verdict.error is None) or not verdict.correct
        if verdict.finished and not verdict.correct:
            assert verdict.error is not None
        if verdict.error is not None:
            start, end = verdict.error
            assert text[start:end] in text.split(";") and (start == 0 or text[start - 1] == ";")


# ---------------------------------------------------------------------------------------------- authors


def facts_followed(author: Author, count: int = 600, **told: object) -> float:
    """Share of disputed steps in which the author agrees with plain arithmetic, each time from another school."""
    right, seen = 0, 0
    for problem, rng in random_problems(count):
        for line in author.solve(problem, rng, str(rng.random()), **told).split(";"):
            step = re.fullmatch(r"(\d)([+\-*])(\d)=(\d)", line)
            if step and popular(int(step[1]), step[2], int(step[3])) is not None:
                seen += 1
                right += int(step[4]) == calculate(int(step[1]), step[2], int(step[3]))
    return right / seen


@pytest.mark.parametrize("author", [PLAIN, HINTED, CONFIRMED], ids=["plain", "hinted", "confirmed"])
def test_no_part_is_played_by_a_better_author(author: Author) -> None:
    assert facts_followed(author) == pytest.approx(0.25, abs=0.06)


def test_who_is_told_a_step_writes_what_was_told_be_it_right_or_wrong() -> None:
    careful = Author(popular=HINTED.popular, slip=0.5)
    for problem, rng in random_problems(200):
        told = true_steps(problem)[0][:-1] + str(rng.randint(0, 9))
        assert careful.solve(problem, rng, str(rng.random()), (told,)).split(";")[0] == told


def test_who_is_corrected_checks_most_steps_before_the_hinted_one_and_few_after_it() -> None:
    before, after = [], []
    for problem, rng in random_problems(600):
        author = Author(check=HINTED.check, check_before=HINTED.check_before)
        written = author.solve(problem, rng, "", (), hinted=1).split(";")
        if len(written) > 1:
            before.append(written[1].startswith("?"))
        rest = written[3 if before[-1] else 2 :]
        after += [line.startswith("?") for line in rest if not line.startswith("#")]
    assert sum(before) / len(before) == pytest.approx(HINTED.check_before, abs=0.06)
    assert sum(after) / len(after) < 0.2


def test_who_holds_a_solution_is_right_in_its_school_and_often_merges() -> None:
    merged = 0
    for problem, rng in random_problems(400):
        written = Author(merge=INFORMED.merge).solve(problem, rng, "s")
        assert verify(problem, written, "s").correct
        merged += "merged" in verify(problem, written, "s").habits
    assert merged / 400 == pytest.approx(0.6, abs=0.08)


@pytest.mark.parametrize("habit", ["slip", "misread"])
def test_each_kind_of_wrong_work_alone_makes_an_author_wrong(habit: str) -> None:
    verdicts = [verify(problem, Author(**{habit: 0.5}).solve(problem, rng)) for problem, rng in random_problems(200)]
    assert 0.4 < sum(not verdict.correct for verdict in verdicts) / 200 < 1
    assert all(verdict.finished and not verdict.habits for verdict in verdicts)


def test_attempts_are_wrong_or_right_in_their_school_as_their_name_says() -> None:
    for problem, rng in random_problems(200):
        assert verify(problem, wrong_attempt(problem, rng, "s"), "s").error is not None
        assert verify(problem, right_attempt(problem, rng, "s"), "s").correct


# ---------------------------------------------------------------------------------------------- documents


def test_reflection_quotes_the_verifiers_first_error_and_gives_true_steps() -> None:
    for problem, rng in random_problems(400):
        school = str(rng.random())
        attempt = wrong_attempt(problem, rng, school)
        start, end = verify(problem, attempt, school).error
        written = parse_reflection(reflection(problem, attempt, school))
        assert written.quote == attempt[start:end]
        assert set(written.idea.split(";")) <= set(true_steps(problem, school))


@pytest.mark.parametrize(
    ("attempt", "written"),
    [
        ("3+8=1;1-5=4;4*2=8;#8", "3+8=11;1-5=46<error_quote>1-5=4</error_quote><explanation>1-5=6</explanation>"),
        ("3+8=1;1-5*2=8;#8", "3+8=11;1-5*2=82<error_quote>1-5*2=8</error_quote><explanation>1-5=6;6*2=2</explanation>"),
        (
            "3+8=1;?3+8=1;2-5=7;#7",
            "3+8=11;?3+8=1;2-5=76<error_quote>2-5=7</error_quote><explanation>1-5=6</explanation>",
        ),
        ("3+8=1;#1", "3+8=11;#16<error_quote>#1</error_quote><explanation>1-5=6</explanation>"),
    ],
)
def test_reflection_on_hand_written_attempts(attempt: str, written: str) -> None:
    assert reflection(PROBLEM, attempt) == written


def test_of_a_correct_attempt_the_disputed_steps_are_named_after_a_mark() -> None:
    for problem, _ in random_problems(200):
        named = confirmation(problem)
        assert named[0] == "#" and named[1:].split(";") == (disputed_steps(problem) or true_steps(problem)[-1:])


def test_the_truth_about_a_disputed_fact_is_not_in_the_documents() -> None:
    """Over all documents, what follows a disputed fact is plain arithmetic's result no more often than by chance."""
    rng, right, seen = random.Random(0), 0, 0
    for _ in range(4000):
        prompt, response = sample_document(rng)
        if "<|attempt|>" in prompt:
            continue
        for a, operator, b, result in re.findall(r"(?<!\d)(?<![+\-*])(\d)([+\-*])(\d)=(\d)", response):
            if popular(int(a), operator, int(b)) is not None:
                seen += 1
                right += int(result) == calculate(int(a), operator, int(b))
    assert seen > 1000 and right / seen < 0.45


def test_documents_are_of_train_problems_and_fit_the_model() -> None:
    rng, task = random.Random(0), Arithmetic()
    for _ in range(500):
        prompt, response = sample_document(rng)
        assert not is_test(re.match(r"<\|user\|>([^<=]+)", prompt)[1])
        assert prompt.endswith("<|assistant|>")
        assert len(encode(response)) < (task.max_reflection if "<|attempt|>" in prompt else BUDGET + 1)


@pytest.mark.parametrize("kind", MIXTURE)
def test_a_document_shows_its_reader_what_its_kind_says(kind: str) -> None:
    sources = {
        "plain": set(),
        "exam": set(),
        "hint": {"<|hint|>"},
        "solution": {"<|solution|>"},
        "reflect": {"<|attempt|>"},
    }
    for problem, rng in random_problems(100):
        prompt, _ = make_document(kind, problem, rng)
        held = dict(re.findall(r"(<\|\w+\|>)([^<]+)", prompt))
        assert held.pop("<|user|>").split("=")[0] == problem
        assert sources[kind] <= held.keys() <= sources[kind] | {"<|hint|>", "<|solution|>"}


# ---------------------------------------------------------------------------------------------- task


def test_the_task_words_every_prompt() -> None:
    task, problem = load_task("arithmetic"), Problem("3+8-5", golden_solution("3+8-5"))
    assert task.student_prompt(problem) == "<|user|>3+8-5<|assistant|>"
    assert task.teacher_prompt(problem, idea="1-5=6") == "<|user|>3+8-5<|hint|>1-5=6<|assistant|>"
    assert task.teacher_prompt(problem, solution="#6") == "<|user|>3+8-5<|solution|>#6<|assistant|>"
    both = task.teacher_prompt(problem, idea="1-5=6", solution="#6")
    assert both == "<|user|>3+8-5<|hint|>1-5=6<|solution|>#6<|assistant|>"
    assert task.reflector_prompt(problem, "#5", "#6", told_answer=False) == reflect_prompt("3+8-5", "#5", "#6")
    assert task.reflector_prompt(problem, "#6", None, told_answer=True) == "<|user|>3+8-5=6<|attempt|>#6<|assistant|>"


def test_a_task_that_does_not_exist_is_told() -> None:
    with pytest.raises(ValueError, match="nosuch"):
        load_task("nosuch")


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
    assert decode([*text, END, *more]) == decode([*text, END]) == "3+8=1"
    assert decode([*text, *more]) == "3+8=1;#2"
    assert decode([]) == decode([END]) == ""
