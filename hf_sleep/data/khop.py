"""k-hop: remember a shuffled directed cycle, then say k-th successors of nodes; told as edges, or as facts."""

import hashlib
import random
from dataclasses import dataclass

from ..labels import IGNORED
from .task import SPLITS, Row, Task

HELD_OUT = 8


def is_held_out(successor: list[int]) -> bool:
    """Tell whether the cycle u → `successor[u]` is among the one in 8 that only test rows hold."""
    return hashlib.sha256(repr(successor).encode()).digest()[0] % HELD_OUT == 0


def draw_cycle(rng: random.Random, num_nodes: int, split: str) -> list[int]:
    """The successor of every node, in a cycle that rows of `split` may hold."""
    successor = [0] * num_nodes
    while True:
        order = rng.sample(range(num_nodes), num_nodes)
        for u, v in zip(order, order[1:] + order[:1], strict=True):
            successor[u] = v
        if is_held_out(successor) == (split == SPLITS[1]):
            return successor


def are_hops(hops: object, num_nodes: int) -> bool:
    """Tell whether `hops` is a tuple of hop counts below `num_nodes`, ascending."""
    if not isinstance(hops, tuple) or not hops or not all(type(k) is int and 1 <= k < num_nodes for k in hops):
        return False
    return list(hops) == sorted(set(hops))


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
        self._require("hops", are_hops(self.hops, n), f"it must be a tuple of integers from 1 to {n - 1}, ascending")
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
        successors = [draw_cycle(rng, n, split) for _ in range(self.cycles)]
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


@dataclass(frozen=True)
class KHopText(Task):
    """A random directed cycle told fact by fact, in tokens that recur in every row, then questions, each of its own k.

    A row is the n facts `u > v ;` in random order, one window of 4 n tokens, then the prediction window
    `[k_1, u_1, ..., k_q, u_q, fill]`. Hop counts and nodes are drawn with replacement, all equally likely. The label
    right after each u is its k-th successor. It is never fed back, so no answer helps with another; the fill at the end
    carries the last label. All rows have the same length, without pads. Test rows hold cycles that a hash picks, one in
    8, training rows the others.

    A plain decoder learns it with everything in its context, a sleeping one with the facts' window slept on: the same
    rows show what a pretrained model's sleep keeps.

    Tokens: the names, `>`, `;`, a hop count for every k below their number, and the fill. They do not depend on
    `num_nodes`, so training can begin with short cycles, nor on `hops`.

    Args:
        num_nodes: n. In a cycle of 6, 4 hops are but 2 backwards.
        hops: the values of k, ascending and below n.
        num_questions: q. `None`: as many as fit into a window, 2 n - 1.
        num_names: what the nodes of a row are drawn from. `None`: n.

    Raises:
        ValueError: naming the field, what it got and what would work.

    Source: our own, not in Lee et al. 2026.
    """

    num_nodes: int = 8
    hops: tuple[int, ...] = (1, 2, 3, 4)
    num_questions: int | None = None
    num_names: int | None = None

    def __post_init__(self) -> None:
        self._require_int("num_nodes", 5)
        n = self.num_nodes
        self._require("hops", are_hops(self.hops, n), f"it must be a tuple of integers from 1 to {n - 1}, ascending")
        if self.num_questions is not None:
            self._require_int("num_questions", 1, 2 * n - 1)
        if self.num_names is not None:
            self._require_int("num_names", n)

    @property
    def vocab_size(self) -> int:
        return self.fill_token + 1

    @property
    def hop_token(self) -> int:
        """The token of k = 1; the others follow."""
        return self._names + 2

    @property
    def fill_token(self) -> int:
        return self.hop_token + self._names - 1

    @property
    def window_size(self) -> int:
        return 4 * self.num_nodes

    @property
    def length(self) -> int:
        return self.window_size + 2 * self._questions + 1

    @property
    def difficulties(self) -> tuple[int, ...]:
        return self.hops

    @property
    def _questions(self) -> int:
        return 2 * self.num_nodes - 1 if self.num_questions is None else self.num_questions

    @property
    def _names(self) -> int:
        return self.num_nodes if self.num_names is None else self.num_names

    def chance(self, difficulty: int) -> float:
        """Share of right guesses among the row's nodes but the one asked for: 1 / (n - 1).

        Who knows hops 1 and 2 and guesses among the other nodes gets 1 / (n - 3) at 3 hops.
        """
        return 1 / (self.num_nodes - 1)

    def answers(self, row: Row) -> list[tuple[int, list[int]]]:
        """List every question's answer as one of its own, with the k that it was asked with."""
        ids = row["input_ids"]
        labelled = [i for i, label in enumerate(row["labels"]) if label != IGNORED]
        return [(ids[i - 2] - self.hop_token + 1, [i]) for i in labelled]

    def _make(self, rng: random.Random, split: str) -> Row:
        n, arrow = self.num_nodes, self._names
        names = sorted(rng.sample(range(self._names), n))
        successor = draw_cycle(rng, n, split)
        ids = [token for u in rng.sample(range(n), n) for token in (names[u], arrow, names[successor[u]], arrow + 1)]
        labels = [IGNORED] * (len(ids) + 1)
        answer = []
        hops = [rng.choice(self.hops) for _ in range(self._questions)]
        for k in hops:
            u = v = rng.randrange(n)
            for _ in range(k):
                v = successor[v]
            ids += [self.hop_token + k - 1, names[u]]
            labels += [IGNORED, names[v]]
            answer.append(names[v])
        return {"input_ids": [*ids, self.fill_token], "labels": labels, "difficulty": max(hops), "answer": answer}
