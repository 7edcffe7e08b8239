"""Rule 110: remember strings of bits, and say the first bit of each after t steps of a cellular automaton."""

import functools
import random
from dataclasses import dataclass

import numpy as np

from ..labels import IGNORED
from .task import Row, Task

QUERY = 2
BOUNDARIES = ("ring", "zero")
EXACT_WIDTH = 16
SAMPLES = 2**20


def evolve(cells: np.ndarray, steps: int, boundary: str = "ring") -> np.ndarray:
    """Run Rule 110.

    Args:
        cells: `[W, ...]`, integers; each bit of theirs is an automaton of its own, so 0 and 1 will do.
        steps: how many.
        boundary: what cells 0 and W - 1 have as their outer neighbours: each other (`"ring"`), or 0 (`"zero"`).

    Returns:
        `[W, ...]`.
    """
    for _ in range(steps):
        left, right = np.roll(cells, 1, 0), np.roll(cells, -1, 0)
        if boundary == "zero":
            left[0] = right[-1] = 0
        # Of the eight neighbourhoods, 111, 100 and 000 give 0.
        cells = (cells | right) & ~(left & cells & right)
    return cells


@functools.lru_cache(maxsize=64)
def density(width: int, steps: int, boundary: str = "ring") -> float:
    """Share of strings of `width` random bits whose first is 1 after `steps`.

    Exact up to 16 bits that matter, else from 2^20 seeded strings: a standard error of 0.0005.
    """
    width = min(width, 2 * steps + 1)
    if width <= EXACT_WIDTH:
        states = np.arange(2**width) >> np.arange(width)[:, None] & 1
        return float(evolve(states, steps, boundary)[0].mean())
    packed = np.frombuffer(np.random.default_rng(0).bytes(width * SAMPLES // 8), np.uint8).reshape(width, -1)
    return float(np.unpackbits(evolve(packed, steps, boundary)[0]).mean())


@dataclass(frozen=True)
class Rule110(Task):
    """Strings of random bits, one to a window, then a query token and an answer bit for each string.

    A row is `num_strings * width` bits (tokens 0 and 1), the query token 2, and `num_strings` answers: answer i is the
    first bit of string i after `steps` steps. With L = `width` every string fills one window that sleeps. The query
    token opens the last window, which is read in one pass and holds all that is predicted. So with hard eviction the
    strings are known from the fast weights alone. All rows have the same length, without pads.

    Args:
        width: W, bits in a string.
        steps: t, automaton steps from the string to its answer. Steps in between are never shown.
        num_strings: how many strings, and windows that sleep.
        boundary: `"ring"`: the first and the last bit are neighbours. `"zero"` is there to check against other
            implementations: under it the first bit soon is 1 whatever the string.

    Raises:
        ValueError: naming the field, what it got and what would work.

    Source: Lee et al. 2026 (arXiv 2605.26099), the Rule 110 experiment; the paper leaves boundary and query token open.
    """

    width: int = 24
    steps: int = 32
    num_strings: int = 4
    boundary: str = "ring"

    def __post_init__(self) -> None:
        self._require_int("num_strings", 1)
        self._require_int("width", 3)
        self._require_int("steps", 1)
        self._require("boundary", self.boundary in BOUNDARIES, f"it must be one of {BOUNDARIES}")
        needed = self.num_strings + 1
        self._require("width", self.width >= needed, f"the query and its answers fill one window: at least {needed}")

    @classmethod
    def paper(cls, steps: int = 32) -> "Rule110":
        """Four strings of 24 bits, L = 24. The paper's t: 32, and 4, 8, 10, 12, 14, 16 where it varies depth."""
        return cls(steps=steps)

    @property
    def vocab_size(self) -> int:
        return QUERY + 1

    @property
    def window_size(self) -> int:
        return self.width

    @property
    def length(self) -> int:
        return self.num_strings * (self.width + 1) + 1

    @property
    def difficulties(self) -> tuple[int, ...]:
        return (self.steps,)

    @property
    def claims_depth(self) -> bool:
        """Tell whether accuracy speaks of depth: W > 2t + 1, so that an answer depends on 2t + 1 distinct bits.

        Below that the light cone wraps around the ring, and a small ring can be learned by heart: at W = 8 there are
        256 strings. The paper's W = 24 passes up to t = 11; it has 2^24 strings.
        """
        return self.width > 2 * self.steps + 1

    def chance(self, difficulty: int) -> float:
        """Share of rows in which the commoner bit is right for every string: 0.100 in the paper's setting at t = 32."""
        ones = density(self.width, difficulty, self.boundary)
        return max(ones, 1 - ones) ** self.num_strings

    def _make(self, rng: random.Random, split: str) -> Row:
        return self._make_many([rng], split)[0]

    def _make_many(self, rngs: list[random.Random], split: str) -> list[Row]:
        size = self.num_strings * self.width
        num_bytes = (size + 7) // 8
        drawn = b"".join(rng.getrandbits(size).to_bytes(num_bytes, "little") for rng in rngs)
        packed = np.frombuffer(drawn, np.uint8).reshape(len(rngs), num_bytes)
        bits = np.unpackbits(packed, axis=1, count=size, bitorder="little")
        cells = bits.reshape(len(rngs), self.num_strings, self.width).transpose(2, 0, 1)
        answers = evolve(np.ascontiguousarray(cells), self.steps, self.boundary)[0]
        ignored = [IGNORED] * (size + 1)
        return [
            {
                "input_ids": [*context, QUERY, *answer],
                "labels": ignored + answer,
                "difficulty": self.steps,
                "answer": answer,
            }
            for context, answer in zip(bits.tolist(), answers.tolist(), strict=True)
        ]
