"""k-hop: remember a shuffled directed cycle, then say the k-th successor of every node."""

import hashlib
import random
from dataclasses import dataclass

from ..labels import IGNORED
from .task import SPLITS, Row, Task

HELD_OUT = 8


def is_held_out(successor: list[int]) -> bool:
    """Tell whether the cycle u → `successor[u]` is among the one in 8 that only test rows hold."""
    return hashlib.sha256(repr(successor).encode()).digest()[0] % HELD_OUT == 0


@dataclass(frozen=True)
class KHop(Task):
    """A random directed cycle written as edges in random order, then a hop count k and the nodes it is asked for.

    A row is the edges `u * n + v`, spread over `windows` windows and filled up to L tokens each, then the prediction
    window `[K_k, u_1, ..., u_q, fill]`. With several `cycles`, each has names and windows of its own, one cycle after
    another. One of them, all equally likely, is asked about. The label right after each u is its k-th successor. It is
    never fed back, so every answer stands alone; the fill at the end carries the last label. All rows have the same
    length, without pads; fill is a real token. Test rows hold cycles that a hash picks, one in 8, training rows the
    others.

    L is the larger of `q + 2` and the most edges in a window. With one window and all n nodes asked it is n + 2, and
    the edges' window ends in two fills. `num_queries = n - 2` fits L = n exactly.

    Tokens: n² edges per cycle, then n nodes per cycle, one per hop count in `hops`, and the fill.

    Args:
        num_nodes: n, of each cycle. Small n is soon solved, and n = 12 is slow to learn.
        hops: the values of k, ascending and below n; one is drawn per row, all equally likely.
        num_queries: q, nodes asked. `None`: all.
        windows: windows that a cycle's edges are spread over, as evenly as possible; each of them sleeps.
        cycles: cycles in a row.

    Raises:
        ValueError: naming the field, what it got and what would work.

    Source: our own, not in Lee et al. 2026: the smallest setting found in which more passes reach further.
    """

    num_nodes: int = 8
    hops: tuple[int, ...] = (1, 2, 3, 4)
    num_queries: int | None = None
    windows: int = 1
    cycles: int = 1

    def __post_init__(self) -> None:
        # Fewer than 5 nodes make so few cycles that none might be held out.
        self._require_int("num_nodes", 5)
        n = self.num_nodes
        hops = self.hops if isinstance(self.hops, tuple) else ()
        works = bool(hops) and all(type(k) is int and 1 <= k < n for k in hops) and list(hops) == sorted(set(hops))
        self._require("hops", works, f"it must be a tuple of integers from 1 to {n - 1}, ascending")
        if self.num_queries is not None:
            self._require_int("num_queries", 1, n)
        self._require_int("windows", 1, n)
        self._require_int("cycles", 1)

    @property
    def vocab_size(self) -> int:
        return self.fill_token + 1

    @property
    def node_token(self) -> int:
        """The token of node 0 of the first cycle; the others follow."""
        return self.cycles * self.num_nodes**2

    @property
    def hop_token(self) -> int:
        """The token that asks for `hops[0]`; the others follow."""
        return self.node_token + self.cycles * self.num_nodes

    @property
    def fill_token(self) -> int:
        return self.hop_token + len(self.hops)

    @property
    def window_size(self) -> int:
        return max(-(-self.num_nodes // self.windows), self._queries + 2)

    @property
    def length(self) -> int:
        return self.cycles * self.windows * self.window_size + self._queries + 2

    @property
    def difficulties(self) -> tuple[int, ...]:
        return self.hops

    @property
    def _queries(self) -> int:
        return self.num_nodes if self.num_queries is None else self.num_queries

    def chance(self, difficulty: int) -> float:
        """Share of right guesses among all nodes but the one asked for: 1 / (n - 1).

        Who knows hops 1 and 2 and guesses among the other nodes gets 1 / (n - 3) at the hops beyond.
        """
        return 1 / (self.num_nodes - 1)

    def answers(self, row: Row) -> list[tuple[int, list[int]]]:
        """List every node as an answer of its own."""
        return [(row["difficulty"], [i]) for i, label in enumerate(row["labels"]) if label != IGNORED]

    def _make(self, rng: random.Random, split: str) -> Row:
        n, fill = self.num_nodes, self.fill_token
        successors = [self._cycle(rng, split) for _ in range(self.cycles)]
        which = rng.randrange(len(self.hops))
        ids: list[int] = []
        for number, successor in enumerate(successors):
            edges = [number * n * n + u * n + successor[u] for u in rng.sample(range(n), n)]
            for w in range(self.windows):
                window = edges[n * w // self.windows : n * (w + 1) // self.windows]
                ids += window + [fill] * (self.window_size - len(window))
        about = rng.randrange(self.cycles) if self.cycles > 1 else 0
        asked = rng.sample(range(n), self._queries)
        answer = asked
        for _ in range(self.hops[which]):
            answer = [successors[about][u] for u in answer]
        first = self.node_token + about * n
        labels = [IGNORED] * (len(ids) + 2) + [first + v for v in answer]
        ids += [self.hop_token + which, *(first + u for u in asked), fill]
        return {"input_ids": ids, "labels": labels, "difficulty": self.hops[which], "answer": answer}

    def _cycle(self, rng: random.Random, split: str) -> list[int]:
        """The successor of every node, in a cycle that rows of `split` may hold."""
        successor = [0] * self.num_nodes
        while True:
            order = rng.sample(range(self.num_nodes), self.num_nodes)
            for u, v in zip(order, order[1:] + order[:1], strict=True):
                successor[u] = v
            if is_held_out(successor) == (split == SPLITS[1]):
                return successor
