"""MQAR, multi-query associative recall: remember pairs of tokens, then say the value of each key that is asked."""

import random
from dataclasses import dataclass

from ..labels import IGNORED
from .task import Row, Task


@dataclass(frozen=True)
class MQAR(Task):
    """Pairs of a key and a value, slept on, then keys alone, each of which is to be followed by its value.

    A row is the pairs `k_1 v_1 ... k_n v_n`, spread over `windows` windows as evenly as possible, then the keys that
    are asked, in random order, and the end token. `sleep_after` is 1 at the last token of each window, so a window is
    as long as its pairs, up to L, and holds no fill. All keys of a row differ, and so do all values, whose pairing is
    uniform. The label right after each key is its value. It is never fed back, so every answer stands alone; the end
    token carries the last label. All rows have the same length, without pads. `choices` are the values of a row, in the
    order of their ids: a model that was not trained on such rows may know which of them is a key's, and yet think
    another token likelier than all of them.

    Accuracy against `pairs` is a memory's capacity: rows of any number of pairs speak the same tokens.

    Tokens: the end is `first_id`. Of the ids after it, up to `vocab_size - 1`, the first half are keys, the second half
    values; an odd one out is not used. A pretrained model reads them as any others: they must lie below its own
    vocabulary's size, and `first_id` above its special tokens. Those of most models are below 1000, or at the end.

    Args:
        pairs: n, in a row.
        queries: keys that are asked, all in one window. `None`: all, or as many as fit into a window, L - 1.
        vocab_size: one more than the largest token id.
        first_id: the smallest token id.
        windows: windows that the pairs are spread over; each of them sleeps. `None`: as few as hold them.
        window_size: L, in tokens.

    Raises:
        ValueError: naming the field, what it got and what would work.

    Source: Arora et al. 2023, Zoology (arXiv 2312.04927), with its halves of the vocabulary. There the keys come
    again among random tokens, sooner more often than later; here all of them come after a sleep.
    """

    pairs: int = 32
    queries: int | None = None
    vocab_size: int = 8192
    first_id: int = 1000
    windows: int | None = None
    window_size: int = 512

    def __post_init__(self) -> None:
        self._require_int("pairs", 1)
        n = self.pairs
        self._require_int("window_size", 2)
        self._require_int("first_id", 0)
        self._require_int("vocab_size", self.first_id + 1 + 2 * n)
        if self.queries is not None:
            self._require_int("queries", 1, min(n, self.window_size - 1))
        if self.windows is not None:
            self._require_int("windows", self._fewest_windows, n)

    @property
    def length(self) -> int:
        return 2 * self.pairs + self._queries + 1

    @property
    def difficulties(self) -> tuple[int, ...]:
        return (self.pairs,)

    @property
    def first_key(self) -> int:
        return self.first_id + 1

    @property
    def first_value(self) -> int:
        return self.first_key + self._half

    @property
    def _half(self) -> int:
        """Keys there are, and values."""
        return (self.vocab_size - self.first_key) // 2

    @property
    def _queries(self) -> int:
        return min(self.pairs, self.window_size - 1) if self.queries is None else self.queries

    @property
    def _fewest_windows(self) -> int:
        return -(-self.pairs // (self.window_size // 2))

    @property
    def _windows(self) -> int:
        return self._fewest_windows if self.windows is None else self.windows

    def chance(self, difficulty: int) -> float:
        """Share of right guesses among the values of the row: 1 / n.

        More takes knowing whose they are. Who has not read them gets one in as many as the vocabulary has.
        """
        return 1 / difficulty

    def answers(self, row: Row) -> list[tuple[int, list[int]]]:
        """List every key's value as an answer of its own."""
        return [(row["difficulty"], [i]) for i, label in enumerate(row["labels"]) if label != IGNORED]

    def _make(self, rng: random.Random, split: str) -> Row:
        n, windows = self.pairs, self._windows
        keys = rng.sample(range(self.first_key, self.first_value), n)
        values = rng.sample(range(self.first_value, self.first_value + self._half), n)
        asked = rng.sample(range(n), self._queries)
        answer = [values[i] for i in asked]
        told = [token for pair in zip(keys, values, strict=True) for token in pair]
        sleep_after = [0] * self.length
        for w in range(1, windows + 1):
            sleep_after[2 * (n * w // windows) - 1] = 1
        row: Row = {
            "input_ids": [*told, *(keys[i] for i in asked), self.first_id],
            "labels": [IGNORED] * (len(told) + 1) + answer,
            "sleep_after": sleep_after,
        }
        return row | {"difficulty": n, "answer": answer, "choices": sorted(values)}
