"""The synthetic task: problems, number facts, the verifier that finds the first error, prompts and tokens."""

import random
import re
from collections import Counter

import pytest
from conftest import random_problems

from data import Problem, Verdict, load_task
from data.arithmetic import Arithmetic, Exams
from data.chains import (
    DOMAINS,
    EXAM_MARK,
    NERVOUS,
    calculate,
    golden_solution,
    half,
    is_test,
    make_problem,
    marked,
    nervous,
    popular,
    right_by_luck,
    true_steps,
    true_values,
    verify,
)
from data.documents import sample_document
from data.tokenizer import END, SPECIAL_TOKENS, VOCAB_SIZE, decode, encode, pieces

FACTS = [(a, operator, b) for a in range(10) for operator in "+-*" for b in range(1, 10)]


# ---------------------------------------------------------------------------------------------- problems and facts


def test_train_and_test_problems_are_disjoint_and_the_seed_determines_them() -> None:
    def draw(seed: int, test: bool) -> list[str]:
        rng = random.Random(seed)
        return [make_problem("add", rng, test) for _ in range(2000)]

    assert not set(draw(0, test=False)) & set(draw(0, test=True))
    assert all(map(is_test, draw(0, test=True))) and not any(map(is_test, draw(0, test=False)))
    assert draw(0, test=True) == draw(0, test=True) != draw(1, test=True)


@pytest.mark.parametrize("domain", Exams.domains)
def test_problems_of_a_domain_have_its_operators_lengths_and_mark_and_no_others(domain: str) -> None:
    operators, lengths = DOMAINS[domain.removeprefix("exam-")]
    problems = [make_problem(domain, random.Random(seed)) for seed in range(300)]
    operation = r"[+\-*](![1-9]|[1-9]!?)" if domain[:4] == "exam" else r"[+\-*][1-9]"
    assert all(re.fullmatch(rf"[1-9]({operation})+", problem) for problem in problems)
    chains = [problem.replace("!", "") for problem in problems]
    assert {character for chain in chains for character in chain if not character.isdigit()} == set(operators)
    assert {len(chain) // 2 for chain in chains} == set(lengths)


def test_exams_have_problems_of_every_kind_with_the_mark_and_without_and_none_is_in_both_parts() -> None:
    kinds = {domain.removeprefix("exam-") for domain in Exams.domains if domain.startswith("exam-")}
    assert kinds == {"add", "sub", "mul", "long"} and set(Exams.domains) == {*DOMAINS, *(f"exam-{k}" for k in kinds)}
    rng, task = random.Random(0), load_task("exams")
    parts = [
        {p.question.replace("!", "") for d in Exams.domains for p in task.problems(d, 400, rng, test)}
        for test in (False, True)
    ]
    assert not parts[0] & parts[1] and min(map(len, parts)) > 2000
    for domain in Exams.domains:
        problem = task.problem(domain, rng)
        assert task.verify(problem, problem.solution).correct and problem.solution.count("=") >= 3


def test_facts_has_problems_of_one_half_of_the_disputed_facts_alone() -> None:
    """Every fact is of one half, whatever result is written behind it, and each half has about as many."""
    task, seen = load_task("facts"), {}
    for domain in task.domains:
        problems = [p for test in (False, True) for p in task.problems(domain, 1500, random.Random(0), test)]
        steps = [[step[:3] for step in problem.solution.split(";")[:-1]] for problem in problems]
        disputed = [[s for s in each if popular(int(s[0]), s[1], int(s[2])) is not None] for each in steps]
        assert all(disputed)
        seen[domain] = {fact for each in disputed for fact in each}
        assert {half(f"{fact}={digit}") for fact in seen[domain] for digit in "059"} == {domain}
    these, others = seen.values()
    everything = {f"{a}{operator}{b}" for a, operator, b in FACTS if popular(a, operator, b) is not None}
    assert not these & others and these | others == everything
    assert 0.35 < len(these) / len(everything) < 0.65


def test_marks_change_neither_the_part_nor_the_solution_of_a_problem() -> None:
    for problem, rng in random_problems(200):
        chain = problem.replace(EXAM_MARK, "")
        exam = marked(chain, rng)
        assert is_test(exam) == is_test(chain) and true_steps(exam) == true_steps(chain)
        assert verify(exam, golden_solution(chain)).correct


def test_a_mark_before_an_operand_is_nervous_and_one_behind_it_is_not() -> None:
    assert nervous("3+!8-5!*2") == [True, False, False] and nervous("7*!4!") == [True]
    marks = [is_nervous for _, rng in random_problems(300) for is_nervous in nervous(marked("1" + "+2" * 4, rng))]
    assert sum(marks) / len(marks) == pytest.approx(NERVOUS, abs=0.05)


def test_true_values_are_those_of_python_from_left_to_right() -> None:
    for problem, _ in random_problems(200):
        chain = problem.replace("!", "")
        for length, value in enumerate(true_values(problem)):
            nested = "(" * length + re.sub(r"([+\-*]\d)", r"\1)", chain[: 2 * length + 1])
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
        ("3+8=1?;3+8=1;1-5=6;6*2=2;#2", ("checked",)),
        ("3+8-5=6?;3+8-5=6;6*2=2;#2", ("merged", "checked")),
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
        ("3+8-5=6?;3+8-5=6;6*2=2;#3", "#3"),  # neither the merged step nor its check is to blame
        ("3+8=1?;3+8=2;1-5=6;6*2=2;#3", "?;3+8=2"),  # a check that comes out otherwise
        ("?;3+8=1;1-5=6;#6", "?"),  # a doubt about nothing
        ("3+8=2?;3+8=2;2-5=7;7*2=4;#4", "3+8=2"),  # the doubt was right, and is no part of the error
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
        ("3+8=1;1-5=", None),
        ("3+8=1;1-5=6;6*2=2;", None),
        ("3+8=1?;3+8=1;", "?;3+8=1"),  # the check took the room of the answer
        ("3+8=1;1-5=6?;1-5=6;6*2=2?;6*2=2", "?;1-5=6"),  # the first of two
        ("3+8=2?;3+8=2;2-5", "3+8=2"),
        ("3+8=1?;3+8", None),
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


@pytest.mark.parametrize(
    ("solution", "luck"),
    [
        ("3+8=1;1-5=6;6*2=2;#2", False),
        ("3+8-5=6?;3+8-5=6;6*2=2;#2", False),
        ("#2", False),
        ("3+8=1;1-5=1;1*2=2;#2", True),  # 6*2 and 1*2 are both 2
        ("3+8=7?;3+8=1;1-5=6;6*2=2;#2", True),
        ("3+8-5=1;1*2=2;#2", True),
    ],
)
def test_a_right_answer_behind_a_wrong_step_is_luck(solution: str, luck: bool) -> None:
    assert verify(PROBLEM, solution).correct and right_by_luck(solution) == luck


def test_any_text_gets_a_verdict_that_agrees_with_itself() -> None:
    rng = random.Random(0)
    for _ in range(5000):
        text = "".join(rng.choices("0123456789+-*==;;##??<>é² \n", k=rng.randrange(30)))
        if rng.random() < 0.5:
            text = "3+8=1;1-5=6;"[: rng.randrange(13)] + text
        verdict = verify(PROBLEM, text)
        assert verdict.finished or not verdict.correct
        if verdict.finished:
            assert verdict.correct == (verdict.error is None)
        if verdict.error is not None:
            start, end = verdict.error
            line = text[start:end].removeprefix("?;")  # an error that is a check begins with its mark
            assert line in (part for each in text.split(";") for part in (each, each.removesuffix("?")))
            assert start == 0 or text[start - 1] == ";" or text[start] == "?"


# ---------------------------------------------------------------------------------------------- prompts and tokens


def test_each_part_reads_the_problem_and_what_its_prompt_adds() -> None:
    task, problem = Arithmetic(), Problem("3+8-5", "3+8=1;1-5=6;#6")
    assert task.prompt(problem) == "<|user|>3+8-5<|assistant|>"
    assert task.prompt(problem, idea="1-5=6") == "<|user|>3+8-5<|hint|>1-5=6<|assistant|>"
    assert task.prompt(problem, solution="#6") == "<|user|>3+8-5<|solution|>#6<|assistant|>"
    assert task.prompt(problem, "1-5=6", "#6") == "<|user|>3+8-5<|hint|>1-5=6<|solution|>#6<|assistant|>"
    wrong = "<|user|>3+8-5<|solution|>#6<|attempt|>#5<|assistant|>"
    assert task.reflector_prompt(problem, "#5", "#6", give_answer=False) == wrong
    assert task.reflector_prompt(problem, "#6", None, give_answer=True) == "<|user|>3+8-5=6<|attempt|>#6<|assistant|>"


def test_problems_of_the_task_come_with_their_careful_solution() -> None:
    task, rng = load_task("arithmetic"), random.Random(0)
    for problem in task.problems("mix", 50, rng, test=True):
        assert is_test(problem.question)
        assert task.verify(problem, problem.solution) == Verdict(correct=True, finished=True, error=None)


def test_documents_survive_the_tokenizer_one_token_a_character_or_tag() -> None:
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(sample_document(rng))
        tokens = encode(text)
        assert decode(tokens) == text == "".join(pieces(tokens))
        assert all(len(piece) == 1 or piece in SPECIAL_TOKENS for piece in pieces(tokens))
        assert max(tokens) < VOCAB_SIZE


def test_characters_that_the_vocabulary_lacks_are_refused() -> None:
    for text in ("3+8=x", "3 + 8", "3+8=1\n", "<|nobody|>", "😀"):
        with pytest.raises(ValueError, match="vocabulary"):
            encode(text)


def test_decoding_stops_at_the_end_of_the_text() -> None:
    text, more = encode("3+8=1"), encode(";#2")
    assert decode([*text, END, *more]) == decode([*text, END]) == "3+8=1"
    assert decode([*text, *more]) == "3+8=1;#2"
    assert decode([]) == decode([END]) == ""
