"""Depo: remember the shuffled edges of a directed cycle of names, then name what stands k steps after a given name."""

import random
from dataclasses import dataclass
from typing import Any

from ..labels import IGNORED
from .task import SPLITS, Row, Task

PAD, HOP, ANSWER, SEPARATOR, BOS = 0, 9000, 9500, 9700, 9999

Name = tuple[int, ...]


@dataclass(frozen=True)
class Depo(Task):
    """A directed cycle of n names as edges in random order, then queries `[9000 + k] name [9500] answer`.

    A name is a few tokens in 1..`mini_vocab`, the last of them raised by `mini_vocab`. The loss is on the tokens of the
    answers. Training rows draw n in 3..`max_nodes` with probability ∝ 1 / (n + √max_nodes) and every k in 1..`max_hops`
    alike. Test rows have n = `max_nodes` and k among the powers of two up to `max_hops`, and `max_hops`. k counts
    modulo n.

    Windows count real tokens, so masked pads on the left would not keep a row's windows in place: how much of the
    context is still in the window of the first query would depend on n. With `pad_context`, the default, the context is
    filled up on the left with *real* pad tokens (0: attended, read into the fast weights) to a whole number of windows,
    and no BOS is written. In the paper's setting every row then sleeps on exactly four windows of 75, and is asked in
    the fifth, which a query token opens. After the queries come masked pads up to `length`. Without `pad_context` a row
    is BOS, edges and queries alone, of a length of its own.

    Args:
        max_nodes: N, the most names in a cycle.
        max_hops: K, the largest k.
        num_queries: M, queries in a row; rows with fewer names have one per name.
        mini_vocab: tokens that names are made of.
        min_tlen: fewest tokens of a name.
        max_tlen: most tokens of a name.
        separator: write token 9700 before each edge.
        window_size: L, which the context is filled up to a multiple of. With `pad_context` all queries must fit in it.
        pad_context: whether to fill up the context, as above.
        official: `example(seed)` gives token for token what the official generator makes of `random.Random(seed)`. This
            relies on the order in which CPython lists a set; rows without it do not. Needs `pad_context=False`.

    Raises:
        ValueError: naming the field, what it got and what would work.

    Source: Allen-Zhu, Physics of Language Models: Part 4.1, task Depo; Lee et al. 2026 (arXiv 2605.26099), the Depo
    experiment.
    """

    max_nodes: int = 75
    max_hops: int = 16
    num_queries: int = 10
    mini_vocab: int = 50
    min_tlen: int = 1
    max_tlen: int = 2
    separator: bool = False
    window_size: int = 75
    pad_context: bool = True
    official: bool = False

    def __post_init__(self) -> None:
        self._require_int("max_nodes", 3)
        self._require_int("max_hops", 1, ANSWER - HOP - 1)
        self._require_int("num_queries", 1)
        self._require_int("mini_vocab", 1, HOP // 2)
        self._require_int("min_tlen", 1)
        self._require_int("max_tlen", self.min_tlen)
        self._require_int("window_size", 1)
        for field in ("separator", "pad_context", "official"):
            self._require(field, isinstance(getattr(self, field), bool), "it must be True or False")
        names = sum(self.mini_vocab**size for size in range(self.min_tlen, self.max_tlen + 1))
        self._require("max_nodes", self.max_nodes <= names, f"mini_vocab and lengths allow {names} distinct names")
        if self.pad_context:
            needed = self._prompt_length
            self._require("window_size", self.window_size >= needed, f"the queries fill one window: at least {needed}")
        self._require("official", not (self.official and self.pad_context), "it needs pad_context=False")

    @classmethod
    def paper(cls) -> "Depo":
        """75 nodes, k up to 16, names of 1 or 2 tokens: 300 context tokens and up to 60 of queries, L = 75."""
        return cls()

    @classmethod
    def depo1(cls, max_nodes: int = 225, max_hops: int = 8, **fields: Any) -> "Depo":
        """Names of 1 or 2 tokens out of 50. L = 75 divides the context of 75, 150, 225, ... nodes."""
        return cls(max_nodes, max_hops, **fields)

    @classmethod
    def depo2(cls, max_nodes: int = 75, max_hops: int = 16, **fields: Any) -> "Depo":
        """Names of 5 to 7 tokens out of 3. L = 175 holds the queries and divides the context of 75, 100, 125 nodes."""
        shape = {"mini_vocab": 3, "min_tlen": 5, "max_tlen": 7, "window_size": 175}
        return cls(max_nodes, max_hops, **{**shape, **fields})

    @property
    def vocab_size(self) -> int:
        return BOS + 1

    @property
    def context_length(self) -> int:
        """Most tokens before the first query; with `pad_context` the number of them."""
        edges = self.max_nodes * (2 * self.max_tlen + self.separator)
        return -(-edges // self.window_size) * self.window_size if self.pad_context else edges + 1

    @property
    def length(self) -> int:
        return self.context_length + self._prompt_length

    @property
    def difficulties(self) -> tuple[int, ...]:
        return tuple(sorted({1 << i for i in range(self.max_hops.bit_length())} | {self.max_hops}))

    @property
    def claims_depth(self) -> bool:
        """Tell whether k steps in a test row are k distinct names: n > K."""
        return self.max_nodes > self.max_hops

    @property
    def _prompt_length(self) -> int:
        return min(self.num_queries, self.max_nodes) * 2 * (self.max_tlen + 1)

    def chance(self, difficulty: int) -> float:
        """Share of right guesses among the row's names but the one asked about: 1 / (N - 1) in test rows."""
        return 1 / (self.max_nodes - 1) if difficulty % self.max_nodes else 1.0

    def answers(self, row: Row) -> list[tuple[int, list[int]]]:
        """List every query's name as an answer, with its own k."""
        positions = iter(super().answers(row)[0][1])
        return [(k, [next(positions) for _ in name]) for k, name in zip(row["hops"], row["answer"], strict=True)]

    def _make(self, rng: random.Random, split: str) -> Row:
        # The order of the draws is the official generator's.
        test = split == SPLITS[1]
        sizes = range(3, self.max_nodes + 1)
        n = self.max_nodes if test else rng.choices(sizes, [1 / (n + self.max_nodes**0.5) for n in sizes])[0]
        cycle = self._names(rng, n)
        rng.shuffle(cycle)
        separator = [SEPARATOR] * self.separator
        context: list[int] = []
        for i in rng.sample(range(n), n):
            context += [*separator, *cycle[i], *cycle[(i + 1) % n]]
        ids = [PAD] * (self.context_length - len(context)) + context if self.pad_context else [BOS, *context]
        labels = [IGNORED] * len(ids)
        hops, answer = [], []
        for start in rng.sample(range(n), min(n, self.num_queries)):
            hops.append(rng.choice(self.difficulties) if test else rng.randint(1, self.max_hops))
            answer.append(list(cycle[(start + hops[-1]) % n]))
            question = [HOP + hops[-1], *cycle[start], ANSWER]
            ids += question + answer[-1]
            labels += [IGNORED] * len(question) + answer[-1]
        pads = self.length - len(ids) if self.pad_context else 0
        return {
            "input_ids": ids + [PAD] * pads,
            "labels": labels + [IGNORED] * pads,
            "attention_mask": [1] * len(ids) + [0] * pads,
            "difficulty": max(hops),
            "answer": answer,
            "hops": hops,
            "num_nodes": n,
        }

    def _names(self, rng: random.Random, n: int) -> list[Name]:
        """`n` distinct names, in the order of their drawing or, `official`, in that of a set."""
        names: list[Name] = []
        seen: set[Name] = set()
        letters, sizes = range(1, self.mini_vocab + 1), range(self.min_tlen, self.max_tlen + 1)
        while len(names) < n:
            tokens = [rng.choice(letters) for _ in range(rng.choice(sizes))]
            name = (*tokens[:-1], tokens[-1] + self.mini_vocab)
            if name not in seen:
                names.append(name)
                seen.add(name)
        return list(seen) if self.official else names
