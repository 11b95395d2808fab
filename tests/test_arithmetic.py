"""The synthetic task words its prompts, and its tokenizer loses nothing."""

import random

import pytest

from data import Problem, load_task
from data.chains import (
    golden_solution,
)
from data.documents import (
    sample_document,
)
from data.prompts import reflect_prompt
from data.tokenizer import END, SPECIAL_TOKENS, VOCAB_SIZE, decode, encode, pieces

# ---------------------------------------------------------------------------------------------- task


def test_the_task_words_every_prompt() -> None:
    task, problem = load_task("arithmetic"), Problem("3+8-5", golden_solution("3+8-5"))
    assert task.student_prompt(problem) == "<|user|>3+8-5<|assistant|>"
    assert task.teacher_prompt(problem, idea="1-5=6") == "<|user|>3+8-5<|hint|>1-5=6<|assistant|>"
    assert task.teacher_prompt(problem, solution="#6") == "<|user|>3+8-5<|solution|>#6<|assistant|>"
    both = task.teacher_prompt(problem, idea="1-5=6", solution="#6")
    assert both == "<|user|>3+8-5<|hint|>1-5=6<|solution|>#6<|assistant|>"
    assert task.reflector_prompt(problem, "#5", "#6", give_answer=False) == reflect_prompt("3+8-5", "#5", "#6")
    assert task.reflector_prompt(problem, "#6", None, give_answer=True) == "<|user|>3+8-5=6<|attempt|>#6<|assistant|>"


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
