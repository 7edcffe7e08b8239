"""Plain text as training rows: windows in order, some rows with questions that ask to repeat what was slept on."""

import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..labels import IGNORED
from .words import start_of

BEFORE, AFTER = '\n\nOnce more, from "', '" on:'
"""Words around the tokens that a question gives of the passage that it asks for."""
AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Text:
    """Documents, one after the other.

    Args:
        tokens: `[N]` int32.
        ends: how many tokens come up to the end of each document, ascending; the last is N.
    """

    tokens: torch.Tensor
    ends: list[int]

    @classmethod
    def of(cls, documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, most: int | None = None) -> "Text":
        """Read documents; each ends with the tokenizer's EOS, where it has one.

        Args:
            documents: without the empty ones.
            tokenizer: of the model.
            most: stop after the document that makes it so many tokens; `None`: read all.
        """
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        read: list[torch.Tensor] = []
        total = 0
        for some in _batched(document for document in documents if document.strip()):
            for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
                read.append(torch.tensor([*ids, *end], dtype=torch.int32))
                total += len(read[-1])
                if most is not None and total >= most:
                    return cls.of_ids(read)
        return cls.of_ids(read)

    @classmethod
    def of_ids(cls, documents: Sequence[torch.Tensor]) -> "Text":
        """Put documents of token ids, `[n]` each, one after the other."""
        tokens = torch.cat([*documents, torch.empty(0, dtype=torch.int32)])
        return cls(tokens, list(accumulate(map(len, documents))))

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    def held_out(self, share: float = 0.05) -> tuple["Text", "Text"]:
        """Split off the end: a share of the tokens or, from where a document begins, at most twice as many.

        Args:
            share: of the tokens.

        Returns:
            What is left, and what was split off.
        """
        wanted = round(share * len(self))
        cut = len(self) - wanted
        begins = max((end for end in self.ends if end <= cut), default=0)
        if len(self) - begins <= 2 * wanted:
            cut = begins
        left = [*(end for end in self.ends if end < cut), cut]
        return Text(self.tokens[:cut], left), Text(self.tokens[cut:], [end - cut for end in self.ends if end > cut])

    def sleeps(self, first: int, count: int) -> list[int]:
        """1 at the last tokens of documents, 0 at the others, of `count` tokens from `first` on."""
        marks = [0] * count
        for end in self.ends[bisect_right(self.ends, first) :]:
            if end > first + count:
                break
            marks[end - first - 1] = 1
        return marks


class TextRows(Dataset):
    """Rows of whole windows from random places of a text, in its order; row i depends on the arguments and i alone.

    A plain row has labels everywhere. A row that asks ends with a window of questions: each gives the first tokens of a
    passage from the windows before, which are slept on by then, and is answered by the rest of the passage, on which
    alone there are labels. The passages of a row do not overlap.

    Args:
        text: where rows are from.
        tokenizer: of the model.
        window_size: L, in tokens.
        stages: pairs of a number of rows and the windows that each of these has, in order.
        seed: of the places.
        reconstruct: share of rows that ask, of those with more than one window.
        sleep_at_ends: rows sleep at the end of a document too, and before they ask (`sleep_after`).

    Raises:
        ValueError: naming the argument, what it got and what would work.
    """

    def __init__(
        self,
        text: Text,
        tokenizer: PreTrainedTokenizerBase,
        window_size: int,
        stages: Sequence[tuple[int, int]],
        seed: int = 0,
        reconstruct: float = 0.0,
        sleep_at_ends: bool = False,
    ):
        self.text, self.window_size, self.seed = text, window_size, seed
        self.reconstruct, self.sleep_at_ends = reconstruct, sleep_at_ends
        self.windows = [windows for _, windows in stages]
        self.until = list(accumulate(rows for rows, _ in stages))
        self.start = start_of(tokenizer)
        self.before, self.after = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (BEFORE, AFTER))
        self.given, self.asked = max(2, window_size // 16), max(4, window_size // 4)
        self._check()

    @property
    def question(self) -> int:
        """Tokens of a question and its answer."""
        return len(self.before) + self.given + len(self.after) + self.asked

    def _check(self) -> None:
        if not self.windows or min(self.windows) < 1:
            raise ValueError(f"TextRows: windows={self.windows} in the stages: each must be at least 1")
        if not 0 <= self.reconstruct <= 1:
            raise ValueError(f"TextRows: reconstruct={self.reconstruct!r} must be a share of the rows, from 0 to 1")
        needed = max(self.windows) * self.window_size
        if len(self.text) < needed:
            raise ValueError(
                f"TextRows: the text has {len(self.text)} tokens, and a row of {max(self.windows)} windows "
                f"{needed}: give more text, fewer windows or shorter ones"
            )
        if self.reconstruct and self.question > self.window_size:
            raise ValueError(
                f"TextRows: window_size={self.window_size} with reconstruct={self.reconstruct}: a question takes "
                f"{self.question} tokens. Give longer windows, or reconstruct=0"
            )

    def __len__(self) -> int:
        return self.until[-1]

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Row i: `input_ids`, `labels` and, with `sleep_at_ends`, `sleep_after`."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        # A string seeds through SHA-512, so that neighbouring rows are unrelated.
        rng = random.Random(f"{self.seed}/{i}")
        windows = self.windows[bisect_right(self.until, i)]
        asks = rng.random() < self.reconstruct and windows > 1
        count = (windows - asks) * self.window_size - len(self.start)
        first = rng.randint(0, len(self.text) - count)
        row = self._plain(first, count)
        return self._with_questions(row, rng) if asks else row

    def in_order(self, most: int, windows: int) -> list[dict[str, Any]]:
        """Up to `most` plain rows of `windows` windows, one after the other: to evaluate on."""
        count = windows * self.window_size - len(self.start)
        return [self._plain(first, count) for first in range(0, len(self.text) - count + 1, count)][:most]

    def _plain(self, first: int, count: int) -> dict[str, Any]:
        ids = self.start + self.text.tokens[first : first + count].tolist()
        row = {"input_ids": ids, "labels": list(ids)}
        if self.sleep_at_ends:
            row["sleep_after"] = [0] * len(self.start) + self.text.sleeps(first, count)
        return row

    def _with_questions(self, row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        """A row of text, with as many questions about it as fit into one more window."""
        told = row["input_ids"]
        ids, labels = list(told), [IGNORED] * len(told)
        for first in self._apart(len(told), rng):
            given, asked = told[first:][: self.given], told[first + self.given :][: self.asked]
            question = [*self.before, *given, *self.after]
            ids += question + asked
            labels += [IGNORED] * len(question) + asked
        asking = {"input_ids": ids, "labels": labels}
        if self.sleep_at_ends:
            asking["sleep_after"] = [*row["sleep_after"][:-1], 1] + [0] * (len(ids) - len(told))
        return asking

    def _apart(self, length: int, rng: random.Random) -> list[int]:
        """Where the passages of a row begin, in any order; none overlaps another, which would tell of it."""
        span = self.given + self.asked
        free = length - len(self.start)
        count = min(self.window_size // self.question, free // span)
        places = sorted(rng.randint(0, free - count * span) for _ in range(count))
        firsts = [len(self.start) + place + i * span for i, place in enumerate(places)]
        rng.shuffle(firsts)
        return firsts


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
    some: list[str] = []
    for document in documents:
        some.append(document)
        if len(some) == AT_ONCE:
            yield some
            some = []
    if some:
        yield some
