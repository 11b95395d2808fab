"""The authors of the training documents.

No part is played by a better author. All authors know the same number facts; about a disputed fact each holds what the
school teaches, or what is popular. One part's only advantage over another is what stands in its context.
"""

import random
from dataclasses import dataclass, replace

from data.chains import BUDGET, CHECK_MARK, calculate, nervous, operations, popular


@dataclass(frozen=True)
class Author:
    """How someone writes a solution; every number is a probability."""

    popular: float = 0.0  # a disputed fact is taken as most people do, whatever the school teaches
    slip: float = 0.0  # a step's result is any wrong digit, and the work goes on from there
    misread: float = 0.0  # an operand is copied wrong from the problem
    merge: float = 0.0  # the whole solution is cut short: two or three operations go into each step
    check: float = 0.0  # a step is doubted and written a second time, as a check: '3+8=1?;3+8=1'
    check_marked: float = 0.0  # the same for a step that has a nervous mark in the problem
    check_hinted: float | None = None  # the same for hinted steps that are followed by another; None: as any other step

    def solve(self, problem: str, rng: random.Random, school: str = "", hinted: tuple[str, ...] = ()) -> str:
        """The solution this author writes, e.g. '3+8=1;1-5=6;6*2=2;#2'.

        Steps that the context gives are written as given when their turn comes. Whether a step is checked is decided
        right behind its result.
        """
        todo, marks, value, lines = operations(problem), nervous(problem), int(problem[0]), []
        merging = rng.random() < self.merge
        while todo:
            taken = list(todo[: rng.choice((2, 3)) if merging else 1])
            todo, marks, is_marked = todo[len(taken) :], marks[len(taken) :], any(marks[: len(taken)])
            if rng.random() < self.misread:
                taken[0] = (taken[0][0], rng.randint(1, 9))
            line = str(value) + "".join(f"{operator}{operand}" for operator, operand in taken)
            for operator, operand in taken:
                most = popular(value, operator, operand)
                follows = most is not None and rng.random() < self.popular
                value = most if follows else calculate(value, operator, operand, school)
            if rng.random() < self.slip:
                value = (value + rng.randint(1, 9)) % 10
            for step in hinted:
                if step[:-1] == f"{line}=":
                    value = int(step[-1])
            lines.append(f"{line}={value}")
            overcautious = lines[-1] in hinted[:-1] and self.check_hinted is not None
            usual = self.check_marked if is_marked else self.check
            if rng.random() < (self.check_hinted if overcautious else usual):
                lines.append(lines[-1])
                lines[-2] += CHECK_MARK
        return ";".join([*lines, f"#{value}"])[:BUDGET]


# Half of the schools hold what is popular, and 7 of 10 authors ignore theirs: 17 of 20 plain results are popular.
PLAIN = Author(popular=0.7, slip=0.01, merge=0.05, check=0.1, check_marked=0.9)  # who has nothing but the problem
# who was corrected: overcautious about the steps before the wrong one, as long as they are right
HINTED = replace(PLAIN, check_hinted=0.8)
CONFIRMED = PLAIN  # who was confirmed in some steps
INFORMED = replace(PLAIN, popular=0.0, merge=0.6)  # who holds a solution: it can be read off, and is cut short
CLUMSY = replace(PLAIN, popular=0.7, slip=0.08, misread=0.02, check=0.12)  # who writes the attempts to reflect on
