"""Base of the synthetic tasks: seeded rows, materialised or endless, and how answers are judged."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import count
from typing import Any

from datasets import Dataset, IterableDataset

from ..labels import IGNORED

SPLITS = ("train", "test")
BLOCK = 256

Row = dict[str, Any]


class Task(ABC):
    """A seeded generator of rows; subclasses are frozen dataclasses of the task's parameters.

    Row i is a function of (task, seed, split, i) alone, so `dataset` and `stream` give the same rows in any process,
    and a run can be resumed and shared out. Seeds and splits are drawn independently of each other. Parameters are not,
    so that Rule 110 at two depths asks about the same strings.

    A row has `input_ids` and `labels` (tokens; -100 where there is no loss). The label at a token is what the model
    should say right before it, as everywhere in transformers: the model shifts. Tokens are real (attended, counted by
    windows) unless the row has an `attention_mask` that says otherwise. `difficulty` is an integer and `answer` is what
    was asked for.
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    @abstractmethod
    def window_size(self) -> int:
        """L, the window in tokens that rows are laid out for."""

    @property
    @abstractmethod
    def length(self) -> int:
        """The most tokens a row can have."""

    @property
    @abstractmethod
    def difficulties(self) -> tuple[int, ...]:
        """The difficulties that answers of test rows can have, ascending."""

    @abstractmethod
    def chance(self, difficulty: int) -> float:
        """Expected accuracy on test rows, as `score` judges, of the best guess that follows nothing in the context."""

    @abstractmethod
    def _make(self, rng: random.Random, split: str) -> Row:
        """One row, drawn from `rng`."""

    def _make_many(self, rngs: list[random.Random], split: str) -> list[Row]:
        """A row from each of `rngs`, the same as one by one."""
        return [self._make(rng, split) for rng in rngs]

    def example(self, seed: int | random.Random, split: str = "train") -> Row:
        """One row.

        Args:
            seed: an integer, or a generator to draw from.
            split: `"train"` or `"test"`.
        """
        if isinstance(seed, random.Random):
            self._check_source(0, split)
            return self._make(seed, split)
        self._check_source(seed, split)
        return self._make(random.Random(seed), split)

    def rows(self, seed: int, split: str, indices: range) -> list[Row]:
        """The rows numbered `indices`."""
        self._check_source(seed, split)
        # A string seeds through SHA-512, which neither processes nor platforms salt.
        name = f"{type(self).__name__}/{seed}/{split}/"
        return self._make_many([random.Random(f"{name}{i}") for i in indices], split)

    def dataset(self, size: int, seed: int = 0, split: str = "train") -> Dataset:
        """Rows 0 to `size - 1`, in memory."""
        self._check("size", size, isinstance(size, int) and size > 0, "an integer of at least 1")
        blocks = (range(size)[i : i + BLOCK] for i in range(0, size, BLOCK))
        return Dataset.from_list([row for block in blocks for row in self.rows(seed, split, block)], split=split)

    def stream(self, seed: int = 0, split: str = "train", shards: int = 1, start: int = 0) -> IterableDataset:
        """Rows `start`, `start + 1`, ... without end.

        Args:
            seed: of the rows.
            split: `"train"` or `"test"`.
            shards: how many readers share the rows: ranks (`datasets.distributed.split_dataset_by_node`) times
                data-loader workers. Shard s holds every `shards`-th row from `start + s` on. A shard never ends, so a
                reader that is given several stays in its first.
            start: the first row, to resume at without drawing those before it.
        """
        self._check("shards", shards, isinstance(shards, int) and shards > 0, "an integer of at least 1")
        self._check("start", start, isinstance(start, int) and start >= 0, "an integer of at least 0")
        self._check_source(seed, split)
        firsts = list(range(start, start + shards))
        kwargs = {"task": self, "seed": seed, "split": split, "step": shards, "firsts": firsts}
        return IterableDataset.from_generator(_endless, gen_kwargs=kwargs, split=split)

    def answers(self, row: Row) -> list[tuple[int, list[int]]]:
        """Difficulty and label positions of each answer that is judged as a whole; here all labels are one answer."""
        return [(row["difficulty"], [i for i, label in enumerate(row["labels"]) if label != IGNORED])]

    def score(self, predicted_ids: list[int], row: Row) -> list[tuple[int, bool]]:
        """Judge greedy predictions by exact match.

        Args:
            predicted_ids: `[T]`, the argmax of the logits at every token of `row`, which is about the token after it.
            row: what was read.

        Returns:
            For each answer in the row its difficulty, and whether all of its tokens are right.
        """
        labels = row["labels"]
        length = len(predicted_ids)
        self._check("len(predicted_ids)", length, length == len(labels), f"the row's, {len(labels)}")
        return [(level, all(predicted_ids[i - 1] == labels[i] for i in where)) for level, where in self.answers(row)]

    def _check_source(self, seed: object, split: str) -> None:
        self._check("seed", seed, isinstance(seed, int), "an integer")
        self._check("split", split, split in SPLITS, f"one of {SPLITS}")

    def _check(self, name: str, value: object, works: bool, what_works: str) -> None:
        if not works or isinstance(value, bool):
            raise ValueError(f"{type(self).__name__}: {name}={value!r} cannot work: it must be {what_works}")

    def _require(self, field: str, works: bool, what_works: str) -> None:
        """Check a field of the task."""
        if not works:
            raise ValueError(f"{type(self).__name__}.{field}={getattr(self, field)!r} cannot work: {what_works}")

    def _require_int(self, field: str, least: int, most: int | None = None) -> None:
        value = getattr(self, field)
        works = isinstance(value, int) and not isinstance(value, bool) and value >= least
        works = works and (most is None or value <= most)
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        self._require(field, works, f"it must be an integer {limits}")


def _endless(task: Task, seed: int, split: str, step: int, firsts: list[int]) -> Iterator[Row]:
    for first in firsts:
        for block in count(first, step * BLOCK):
            yield from task.rows(seed, split, range(block, block + step * BLOCK, step))
