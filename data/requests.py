"""The requests to student, teacher and reflector for problems in words; `words.py` puts them into the chat format."""

# The teacher's context follows the question, without a word about its use: after a worked example a model of 135M
# parameters overlooks ideas in longer forms, and repeats what it is told after a solution.
IDEA = "\n\nHint: {idea}"
SOLUTION = "\n\nOne way to solve it, known to be right:\n{solution}"

REFLECT_WRONG = """\
Find the first mistake in an attempt at a problem.

Problem: {question}{answer}

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

Problem: {question}{answer}

The attempt, whose result is right:
{attempt}

Name in a sentence or two the step on which it all depends, for a reader who sees the problem alone. \
Write nothing but this:
<explanation>what matters, and why it is right</explanation>"""

ANSWER = "\nIts result is {answer}."


def problem_request(question: str, ending: str, idea: str | None = None, solution: str | None = None) -> str:
    """The problem alone, or with a corrective idea, with a solution that is right, or with both."""
    given = SOLUTION.format(solution=solution) if solution is not None else ""
    given += IDEA.format(idea=idea) if idea is not None else ""
    return question + given + ending


def reflection_request(question: str, attempt: str, peer: str | None, answer: str | None) -> str:
    """A wrong attempt beside a right solution, or a right attempt alone, perhaps with the answer."""
    template = REFLECT_RIGHT if peer is None else REFLECT_WRONG
    known = ANSWER.format(answer=answer) if answer is not None else ""
    return template.format(question=question, attempt=attempt, peer=peer, answer=known)
