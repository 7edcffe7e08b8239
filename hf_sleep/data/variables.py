"""VariableTracking: remember assignments of variables to each other, and name all that hold a value."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from string import ascii_uppercase

from .haystack import Haystack
from .long_text import Told
from .needle import draw_others

LETTERS = 5
LARGEST = 99_999


@dataclass(frozen=True)
class VariableTracking(Haystack):
    """A haystack, chains of assignments in it, and a question for all variables that hold the number of one chain.

    `Let QXZRA = 48213.`, later `Let BKTOM = QXZRA.`, and so on for `hops` assignments after the first. A chain's
    assignments come in order, at random places. Other chains, of other numbers, distract.

    `difficulty` is `hops`.

    Args:
        chains: of assignments, one of which is asked about.
        hops: assignments of a chain after that of its number.

    Raises:
        ValueError: naming the field, what it got and what would work.

    Source: Hsieh et al. 2024, RULER (arXiv 2404.06654), § 3.2; sentences are our own. There the haystack is
    `"noise"`, and an example comes before the text.
    """

    chains: int = 1
    hops: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_int("chains", 1, 1_000)
        self._require_int("hops", 1)
        self._check_slots("its assignments", -(-self.chains * (self.hops + 1) // self.windows))
        self._check_window("its question and answer", self._question_length + self._answer_length)

    @property
    def difficulties(self) -> tuple[int, ...]:
        return (self.hops,)

    @property
    def new_tokens(self) -> int:
        """RULER's 30 tokens, or as many as the longest answer has."""
        return max(30, self._answer_length)

    def chance(self, difficulty: int) -> float:
        """Share of all names of 5 letters that a guesser says who says another one with each token."""
        return self.new_tokens / len(ascii_uppercase) ** LETTERS

    def _tell(self, rng: random.Random) -> Told:
        length = self.hops + 1
        names = draw_others(lambda: "".join(rng.choices(ascii_uppercase, k=LETTERS)), (), self.chains * length)
        numbers = [str(number) for number in rng.sample(range((LARGEST + 1) // 10, LARGEST + 1), self.chains)]
        slots = rng.sample(range(self.windows * self._slots), len(names))
        hidden = {}
        for i, number in enumerate(numbers):
            own = slice(i * length, (i + 1) * length)
            held = [number, *names[own]]
            for slot, name, source in zip(sorted(slots[own]), names[own], held, strict=False):
                hidden[slot] = self._assignment(name, source)
        question = self._question(numbers[0])
        windows = self._in_windows(hidden)
        return Told(self._opening, windows, self._straw(rng).__next__, question, names[:length], self.hops)

    def _assignment(self, name: str, source: str) -> str:
        return f" Let {name} = {source}."

    def _question(self, number: str) -> str:
        count = f"The {self.hops + 1} variables that hold {number} are"
        return f"\nQuestion: Which variables hold {number}, directly or through others?\nAnswer: {count}"

    @property
    def _opening(self) -> str:
        return "Variables are set in this text. Remember what each of them holds."

    @cached_property
    def _longest(self) -> int:
        return len(self._encode(self._assignment("Q", "Q"))) + 2 * (LETTERS - 1)

    @cached_property
    def _question_length(self) -> int:
        """Most tokens of a question."""
        return len(self._encode(self._question("0"))) + 2 * (len(str(LARGEST)) - 1)

    @cached_property
    def _answer_length(self) -> int:
        """Most tokens of an answer."""
        names: Sequence[str] = ["Q"] * (self.hops + 1)
        return len(self._encode(" " + ", ".join(names)) + self._end) + len(names) * (LETTERS - 1)
