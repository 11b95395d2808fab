"""What every part is asked, in plain words: the prompts of student, teacher and reflector for problems in words.

`data/words.py` puts them into the chat format of the model.
"""

from data.answers import MARK

# What a teacher holds stands behind the question, without instructions. After a worked example a model of 135M
# parameters overlooks ideas in longer forms, and repeats instructions that come after a solution.
IDEA = "\n\nHint: {idea}"
SOLUTION = "\n\nOne way to solve it, known to be right:\n{solution}"

# Questions of Reasoning Gym say themselves how to answer; asked for more, small models are right less often.
ENDING = f"""

Work in short steps where that helps. End with the words "{MARK}" and the result."""

REFLECT_WRONG = """\
Find the first mistake in an attempt at a problem.

Problem: {question}{told}

A right solution:
{peer}

The attempt, whose result is wrong:
{attempt}

Go through the attempt from its beginning, side by side with the right solution, and stop where it first goes wrong. \
Copy those few words or that calculation letter by letter from the attempt. Then say in a sentence or two what is \
wrong there and what is true instead, for a reader who sees the problem alone. Write nothing but this:
<error_quote>copied from the attempt</error_quote><explanation>what is wrong, and what is true</explanation>"""

REFLECT_RIGHT = """\
Say what makes an attempt at a problem succeed.

Problem: {question}{told}

The attempt, whose result is right:
{attempt}

Name in a sentence or two the step on which it all depends, for a reader who sees the problem alone. \
Write nothing but this:
<explanation>what matters, and why it is right</explanation>"""

TOLD = "\nIts result is {answer}."


def problem_request(question: str, ending: str, idea: str | None = None, solution: str | None = None) -> str:
    """The problem alone, or with a corrective idea, with a solution that is right, or with both."""
    held = IDEA.format(idea=idea) if idea is not None else ""
    return question + (SOLUTION.format(solution=solution) if solution is not None else "") + held + ending


def reflection_request(question: str, attempt: str, peer: str | None, answer: str | None) -> str:
    """A wrong attempt beside a right solution, or a right attempt alone; with the answer where it is told."""
    told = "" if answer is None else TOLD.format(answer=answer)
    form = REFLECT_RIGHT if peer is None else REFLECT_WRONG
    return form.format(question=question, attempt=attempt, peer=peer, told=told)
