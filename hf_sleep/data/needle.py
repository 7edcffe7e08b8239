"""Needle: remember a few sentences that are hidden in a long text, and say the numbers that they gave."""

import random
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from .haystack import ADJECTIVES, NOUNS, Haystack
from .long_text import Told

KEYS = ("words", "uuids")
VALUES = ("numbers", "uuids")
DIGITS = 7
SPELLED = 36
"""Characters of a UUID."""


def draw_key(rng: random.Random, kind: str) -> str:
    return draw_uuid(rng) if kind == "uuids" else f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def draw_value(rng: random.Random, kind: str) -> str:
    return draw_uuid(rng) if kind == "uuids" else str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))


def draw_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def draw_others(draw: Callable[[], str], known: Collection[str], n: int) -> list[str]:
    """n of what `draw` gives, all different, and none of `known`."""
    found: dict[str, None] = {}
    while len(found) < n:
        if (drawn := draw()) not in known:
            found[drawn] = None
    return list(found)


@dataclass(frozen=True)
class Needle(Haystack):
    """A haystack, needles that each give a key a value, and a question about the values of some of the keys.

    `A secret number of golden-harbour is 4821937.` stands among many other sentences. `keys` have `values` each,
    `queries` of the keys are asked for, and the others distract. RULER's eight settings of it are in `RULER`.

    `difficulty` is how many windows ago the earliest of the needles that are asked for was read: 1 is the window before
    the question, `windows` the first. All are equally likely. Needles that distract stand in any window.

    Args:
        haystack: as in `Haystack`, or `"needles"`: nothing but needles, of keys that are not asked for.
        keys: that have values.
        values: of each key, all of which are asked for.
        queries: keys that are asked for.
        key_kind: `"words"`, an adjective and a noun, or `"uuids"`.
        value_kind: `"numbers"` of 7 digits, or `"uuids"`.

    Raises:
        ValueError: naming the field, what it got and what would work.

    Source: Hsieh et al. 2024, RULER (arXiv 2404.06654), § 3.1; sentences and words are our own. There needles stand
    anywhere with no regard to windows, and a text starts at its beginning.
    """

    kinds: ClassVar[tuple[str, ...]] = (*Haystack.kinds, "needles")

    keys: int = 1
    values: int = 1
    queries: int = 1
    key_kind: str = "words"
    value_kind: str = "numbers"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_int("keys", 1, len(ADJECTIVES) * len(NOUNS) // 2)
        self._require_int("values", 1)
        self._require_int("queries", 1, self.keys)
        self._require("key_kind", self.key_kind in KEYS, f"it must be one of {KEYS}")
        self._require("value_kind", self.value_kind in VALUES, f"it must be one of {VALUES}")
        self._check_slots("its needles", max(self._asked, -(-self.keys * self.values // self.windows)))
        self._check_window("its question and answer", self._question_length + self._answer_length)

    @property
    def difficulties(self) -> tuple[int, ...]:
        return tuple(range(1, self.windows + 1))

    @property
    def new_tokens(self) -> int:
        """RULER's 128 tokens, or as many as the longest answer has."""
        return max(128, self._answer_length)

    def chance(self, difficulty: int) -> float:
        """Share of all values that a guesser says who says another one with each token.

        For a number begins at each digit of a long one. Where a token has three digits, it is three times as much.
        """
        return self.new_tokens / (9 * 10 ** (DIGITS - 1) if self.value_kind == "numbers" else 2**122)

    def _tell(self, rng: random.Random) -> Told:
        difficulty = rng.choice(self.difficulties)
        keys = draw_others(lambda: draw_key(rng, self.key_kind), (), self.keys)
        values = draw_others(lambda: draw_value(rng, self.value_kind), (), self.keys * self.values)
        slots = self._draw_slots(rng, self.windows - difficulty)
        hidden, answers = {}, []
        for i, key in enumerate(keys):
            own = slice(i * self.values, (i + 1) * self.values)
            for slot, value in zip(sorted(slots[own]), values[own], strict=True):
                hidden[slot] = self._needle(key, value)
                answers += [value] if i < self.queries else []
        filler = self._needles(rng, keys, values) if self.haystack == "needles" else self._straw(rng)
        question = self._question(keys[: self.queries])
        return Told(self._opening, self._in_windows(hidden), filler.__next__, question, answers, difficulty)

    def _draw_slots(self, rng: random.Random, earliest: int) -> list[int]:
        """A slot for each needle; those of the needles asked for come first, the earliest of them in that window."""
        n = self._slots
        first = rng.randrange(earliest * n, (earliest + 1) * n)
        later = [slot for slot in range(earliest * n, self.windows * n) if slot != first]
        asked = [first, *rng.sample(later, self._asked - 1)]
        rng.shuffle(asked)
        free = [slot for slot in range(self.windows * n) if slot not in asked]
        return asked + rng.sample(free, self.keys * self.values - self._asked)

    def _needles(self, rng: random.Random, keys: Collection[str], values: Collection[str]) -> Iterator[str]:
        while True:
            [key] = draw_others(lambda: draw_key(rng, self.key_kind), keys, 1)
            [value] = draw_others(lambda: draw_value(rng, self.value_kind), values, 1)
            yield self._needle(key, value)

    def _needle(self, key: str, value: str) -> str:
        return f" A secret {self._noun} of {key} is {value}."

    def _question(self, keys: Sequence[str]) -> str:
        whose = f"{', '.join(keys[:-1])} and {keys[-1]}" if len(keys) > 1 else keys[0]
        if self._asked == 1:
            return f"\nQuestion: What is the secret {self._noun} of {whose}?\nAnswer: The {self._noun} of {whose} is"
        return f"\nQuestion: What are all secret {self._noun}s of {whose}?\nAnswer: The {self._noun}s of {whose} are"

    @property
    def _opening(self) -> str:
        return f"Secret {self._noun}s stand in this text. Remember them, they are asked for later."

    @property
    def _noun(self) -> str:
        return "number" if self.value_kind == "numbers" else "code"

    @property
    def _asked(self) -> int:
        """Needles that are asked for."""
        return self.queries * self.values

    @cached_property
    def _key(self) -> tuple[str, int]:
        """A key, and the most tokens that another has more: no more than characters."""
        if self.key_kind == "uuids":
            return "0", SPELLED - 1
        adjective = max(ADJECTIVES, key=lambda word: len(self._encode(f" {word}-")))
        return f"{adjective}-{max(NOUNS, key=lambda word: len(self._encode(f' red-{word}')))}", 0

    @cached_property
    def _value(self) -> tuple[str, int]:
        """A value's beginning, and the most tokens that a value has more."""
        return "0", (DIGITS if self.value_kind == "numbers" else SPELLED) - 1

    @cached_property
    def _longest(self) -> int:
        (key, more), (value, rest) = self._key, self._value
        return len(self._encode(self._needle(key, value))) + more + rest

    @cached_property
    def _question_length(self) -> int:
        """Most tokens of a question."""
        key, more = self._key
        return len(self._encode(self._question([key] * self.queries))) + 2 * self.queries * more

    @cached_property
    def _answer_length(self) -> int:
        """Most tokens of an answer."""
        value, more = self._value
        return len(self._encode(" " + ", ".join([value] * self._asked)) + self._end) + self._asked * more
