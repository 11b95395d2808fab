"""The prompts. One set of weights plays every part; the prompt alone says which."""


def prompt(problem: str, hint: str | None = None, solution: str | None = None) -> str:
    """The student's prompt, which is the problem alone, or a teacher's, who holds a hint, a solution or both."""
    parts = {"<|hint|>": hint, "<|solution|>": solution}
    context = "".join(tag + text for tag, text in parts.items() if text is not None)
    return f"<|user|>{problem}{context}<|assistant|>"


def reflect_prompt(problem: str, attempt: str, peer: str | None = None, answer: int | None = None) -> str:
    """The reflector's prompt: a wrong attempt comes with a correct peer, a correct one alone.

    The right answer, where it is given, follows the problem: '3+8-5*2=2'.
    """
    given = "" if answer is None else f"={answer}"
    solution = "" if peer is None else f"<|solution|>{peer}"
    return f"<|user|>{problem}{given}{solution}<|attempt|>{attempt}<|assistant|>"
