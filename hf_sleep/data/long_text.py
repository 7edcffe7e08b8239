"""Base of the tasks in words: several windows of text that are slept on, then a question, answered in words."""

import random
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..labels import IGNORED
from .task import Row
from .words import TaskInWords


@dataclass(frozen=True)
class Told:
    """A text and a question about it.

    Args:
        opening: what the text begins with.
        windows: per window the sentences that must stand in it, in order, each with the space before it.
        filler: makes the next sentence of those that nothing is asked about, with the space before it.
        question: all that comes after the text, up to where the answer begins.
        answers: the words that must be said, in the order in which the labels say them.
        difficulty: of the question.
        fields: more fields of the row, by name.
    """

    opening: str
    windows: Sequence[Sequence[str]]
    filler: Callable[[], str]
    question: str
    answers: Sequence[str]
    difficulty: int
    fields: Row = field(default_factory=dict)


@dataclass(frozen=True)
class LongText(TaskInWords):
    """A text of `windows` windows, and a question about what stands in it.

    Each window is filled up to L tokens with whole sentences, less than a sentence short, those that matter at random
    places among the others, and is slept on before the next one and before the question: `sleep_after` is 1 at its last
    token. Of the others, one that a window has no room for comes in the next one. So whoever answers has nothing but a
    memory. Answers are judged by what is generated after the prompt, which is the row up to the first label: each of a
    row's `references` must occur in it, whatever else does.

    A row's labels are the answers and EOS.

    Args:
        tokenizer: of the model.
        windows: of text.
        window_size: L, in tokens.

    Raises:
        ValueError: naming the field, what it got and what would work.
    """

    windows: int = 4
    window_size: int = 512

    def __post_init__(self) -> None:
        self._require_int("windows", 1)
        self._require_int("window_size", 1)

    @property
    def new_tokens(self) -> int:
        """Tokens that are generated, to be judged."""
        return 128

    @abstractmethod
    def _tell(self, rng: random.Random) -> Told:
        """A text and a question, drawn from `rng`."""

    def judge(self, said: str, row: Row) -> list[bool]:
        """Whether each of the row's references occurs in `said`, in small letters or large ones.

        Source: Hsieh et al. 2024, RULER (arXiv 2404.06654), its match of all references, whose score is their share.
        """
        return [reference.lower() in said.lower() for reference in row["references"]]

    @property
    def vocab_size(self) -> int:
        return max(self.tokenizer.get_vocab().values()) + 1

    @property
    def length(self) -> int:
        return (self.windows + 1) * self.window_size

    def _make(self, rng: random.Random, split: str) -> Row:
        told = self._tell(rng)
        ids = [*self._start, *self._encode(told.opening)]
        sleep_after: list[int] = []
        other = self._encode(told.filler())
        for w, sentences in enumerate(told.windows):
            room = self.window_size - (0 if w else len(ids))
            window, other = self._filled(rng, sentences, other, told.filler, room)
            ids += window
            sleep_after += [0] * (len(ids) - len(sleep_after) - 1) + [1]
        asked = self._encode(told.question)
        answer = self._encode(" " + ", ".join(told.answers)) + self._end
        self._check_window("its question and answer", len(asked) + len(answer))
        labels = [IGNORED] * (len(ids) + len(asked)) + answer
        ids += asked + answer
        row: Row = {
            "input_ids": ids,
            "labels": labels,
            "sleep_after": sleep_after + [0] * (len(ids) - len(sleep_after)),
        }
        row |= {"difficulty": told.difficulty, "answer": list(told.answers), "references": list(told.answers)}
        return row | told.fields

    def _filled(
        self, rng: random.Random, sentences: Sequence[str], other: list[int], filler: Callable[[], str], room: int
    ) -> tuple[list[int], list[int]]:
        """Sentences in their order among filler, less than a sentence short of `room` tokens, and the `other` to come.

        `other` is the next sentence of the filler.
        """
        told = [self._encode(sentence) for sentence in sentences]
        needed = sum(map(len, told))
        self._check_window("what must stand in one", needed + self.window_size - room)
        others: list[list[int]] = []
        while needed + len(other) <= room:
            needed += len(other)
            others.append(other)
            other = self._encode(filler())
        places = sorted((rng.randint(0, len(others)) for _ in told), reverse=True)
        for sentence, place in zip(reversed(told), places, strict=True):
            others.insert(place, sentence)
        return [token for sentence in others for token in sentence], other

    def _check_window(self, what: str, tokens: int) -> None:
        works = tokens <= self.window_size
        self._require("window_size", works, f"it must be at least {tokens}, for {what}")

    @cached_property
    def _end(self) -> list[int]:
        """The token that ends an answer, where the tokenizer has one."""
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
