"""The prompts: one weight set plays every part, told apart by what stands before its text."""


def student_prompt(problem: str) -> str:
    return f"<|user|>{problem}<|assistant|>"


def hint_prompt(problem: str, hint: str) -> str:
    return f"<|user|>{problem}<|hint|>{hint}<|assistant|>"


def solution_prompt(problem: str, solution: str, hint: str | None = None) -> str:
    held = "" if hint is None else f"<|hint|>{hint}"
    return f"<|user|>{problem}{held}<|solution|>{solution}<|assistant|>"


def reflect_prompt(problem: str, attempt: str, peer: str | None = None, answer: int | None = None) -> str:
    """The reflector's prompt: a wrong attempt comes with a correct peer, a correct one alone.

    Whoever is told the right answer finds it after the problem: '3+8-5*2=2'.
    """
    told = "" if answer is None else f"={answer}"
    held = "" if peer is None else f"<|solution|>{peer}"
    return f"<|user|>{problem}{told}{held}<|attempt|>{attempt}<|assistant|>"
