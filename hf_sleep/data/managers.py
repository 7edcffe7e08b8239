"""Managers: remember a paragraph of plain English about who manages whom, then name managers of managers."""

import random
from dataclasses import dataclass
from functools import cached_property

from ..labels import IGNORED
from .khop import is_held_out
from .task import SPLITS, Row
from .words import TaskInWords

NAMES = (
    *("Adam", "Alan", "Alex", "Alice", "Amy", "Andy", "Anna", "Barry", "Ben", "Betty", "Bill", "Bob", "Brian", "Carl"),
    *("Carol", "Chris", "Clara", "Dan", "David", "Dean", "Diana", "Doug", "Ed", "Ella", "Emma", "Eric", "Ethan", "Eve"),
    *("Frank", "Fred", "Gary", "George", "Greg", "Hannah", "Harry", "Helen", "Henry", "Ian", "Ivan", "Jack", "James"),
    *("Jane", "Jason", "Jean", "Jerry", "Jim", "Joan", "Joe", "John", "Julia", "Karen", "Kate", "Keith", "Ken", "Kim"),
    *("Larry", "Laura", "Leo", "Linda", "Lisa", "Lucy", "Luke", "Marc", "Maria", "Martha", "Mary", "Matt", "Max"),
    *("Mike", "Molly", "Nancy", "Neil", "Nick", "Nina", "Oscar", "Owen", "Pam", "Paul", "Peter", "Phil", "Rachel"),
    *("Ralph", "Ray", "Richard", "Robert", "Ron", "Ross", "Roy", "Ruth", "Ryan", "Sally", "Sam", "Sarah", "Scott"),
    *("Sean", "Simon", "Sophie", "Steve", "Sue", "Ted", "Thomas", "Tim", "Tom", "Tony", "Victor", "Walter", "Wendy"),
)
LIKED = (
    *("tea", "coffee", "chess", "music", "rain", "snow", "bread", "cheese", "soup", "apples", "books", "cats", "dogs"),
    *("horses", "birds", "trains", "maps", "films", "poetry", "tennis", "golf", "football", "jazz", "opera", "rice"),
    *("history", "science", "gardens", "boats", "bikes", "hats", "pears", "fish", "honey", "salt"),
)


def fact(name: str, manager: str) -> str:
    return f" The manager of {name} is {manager}."


def question(name: str, hops: int) -> str:
    return f" The manager of{' the manager of' * (hops - 1)} {name} is"


@dataclass(frozen=True)
class Managers(TaskInWords):
    """A paragraph that says who manages each of n people, and questions about managers of managers of some of them.

    `The manager of Ann is Bo. Bo likes tea. ...`, and then `The manager of the manager of Ann is`, with the loss on the
    name alone. Names stand close together, so that short convolutions see both. The managers go round in one circle,
    which no company has: so anyone may be the answer at any k, and nothing but the facts tells who. Sentences about
    what people like fill each of the `windows` windows up to L tokens, less than a sentence short. In a window,
    sentences come in random order. None continues in the next one.

    All of the paragraph is slept on before anything is asked: `sleep_after` is 1 at the last token of each window. Each
    question, on a line of its own, is about another person, with a k of its own. The name that answers it is the label
    of the line's end. It is never fed back, so every answer stands alone. Test rows hold circles that a hash picks, one
    in 8, training rows the others.

    Names are those of a list that are one token each. `difficulty` is the largest k, `hops` has that of every question.

    Args:
        tokenizer: of the model.
        people: n, in a paragraph.
        hops: the values of k, ascending and below n; all equally likely.
        windows: windows that the facts are spread over, as evenly as possible; each of them sleeps.
        questions: in a row, all in one window.
        window_size: L, in tokens.

    Raises:
        ValueError: naming the field, what it got and what would work.

    Source: our own, `KHop` in words; not in Lee et al. 2026.
    """

    people: int = 8
    hops: tuple[int, ...] = (1, 2, 3, 4)
    windows: int = 2
    questions: int = 4
    window_size: int = 64

    def __post_init__(self) -> None:
        self._require_int("people", 5, len(NAMES))
        n = self.people
        known = len(self._names)
        self._require("people", n <= known, f"{known} of the names are one token of this tokenizer: give at most that")
        hops = self.hops if isinstance(self.hops, tuple) else ()
        works = bool(hops) and all(type(k) is int and 1 <= k < n for k in hops) and list(hops) == sorted(set(hops))
        self._require("hops", works, f"it must be a tuple of integers from 1 to {n - 1}, ascending")
        self._require_int("windows", 1, n)
        self._require_int("questions", 1, n)
        self._require("tokenizer", bool(self._encode("\n")), "it must have a token for a line's end")
        longest = max(len(self._encode(fact(name, name))) for name in self._names)
        least = max(len(self._start) + -(-n // self.windows) * longest, self._asked_length)
        self._require_int("window_size", 1)
        self._require("window_size", self.window_size >= least, f"it must be at least {least}, for facts and questions")

    @property
    def vocab_size(self) -> int:
        return max(self.tokenizer.get_vocab().values()) + 1

    @property
    def length(self) -> int:
        return self.windows * self.window_size + self._asked_length

    @property
    def difficulties(self) -> tuple[int, ...]:
        return self.hops

    def chance(self, difficulty: int) -> float:
        """Share of right guesses among the people of the paragraph but the one asked about: 1 / (n - 1).

        Without the paragraph it is as much with several questions, whose other names are n's, and less with one.
        """
        return 1 / (self.people - 1)

    def answers(self, row: Row) -> list[tuple[int, list[int]]]:
        """List every question's name as an answer of its own."""
        where = [i for i, label in enumerate(row["labels"]) if label != IGNORED]
        return [(k, [i]) for k, i in zip(row["hops"], where, strict=True)]

    def _make(self, rng: random.Random, split: str) -> Row:
        n, circle = self.people, self._circle(rng, split)
        ids, sleep_after, order = list(self._start), [0] * len(self._start), rng.sample(range(n), n)
        for w in range(self.windows):
            who = order[n * w // self.windows : n * (w + 1) // self.windows]
            facts = [self._encode(fact(circle[i], circle[(i + 1) % n])) for i in who]
            room = self.window_size - (0 if w else len(self._start))
            window = self._filled(rng, facts, circle, room)
            ids += window
            sleep_after += [0] * (len(window) - 1) + [1]
        labels, hops, answer, end = [IGNORED] * len(ids), [], [], self._encode("\n")
        for i in rng.sample(range(n), self.questions):
            hops.append(rng.choice(self.hops))
            answer.append(circle[(i + hops[-1]) % n])
            asked = self._encode(question(circle[i], hops[-1]))
            ids += asked + end
            labels += [IGNORED] * len(asked) + [self._names[answer[-1]]] + [IGNORED] * (len(end) - 1)
        row: Row = {
            "input_ids": ids,
            "labels": labels,
            "sleep_after": sleep_after + [0] * (len(ids) - len(sleep_after)),
        }
        return row | {"difficulty": max(hops), "hops": hops, "answer": answer}

    def _circle(self, rng: random.Random, split: str) -> list[str]:
        """People, each before their manager, in a circle that rows of `split` may hold."""
        while True:
            circle = rng.sample(list(self._names), self.people)
            manager = dict(zip(circle, circle[1:] + circle[:1], strict=True))
            successor = [NAMES.index(manager[name]) if name in manager else -1 for name in NAMES]
            if is_held_out(successor) == (split == SPLITS[1]):
                return circle

    def _filled(self, rng: random.Random, facts: list[list[int]], people: list[str], room: int) -> list[int]:
        """Facts among sentences about what `people` like, in random order: less than a sentence short of `room`."""
        told, room = list(facts), room - sum(map(len, facts))
        while True:
            filler = self._encode(f" {rng.choice(people)} likes {rng.choice(LIKED)}.")
            room -= len(filler)
            if room < 0:
                rng.shuffle(told)
                return [token for sentence in told for token in sentence]
            told.append(filler)

    @cached_property
    def _names(self) -> dict[str, int]:
        """The names that are one token after others, each with its token."""
        before = self._encode("manager is")
        found = {name: self._encode(f"manager is {name}") for name in NAMES}
        return {name: ids[-1] for name, ids in found.items() if ids[:-1] == before}

    @cached_property
    def _asked_length(self) -> int:
        """Most tokens of the questions of a row."""
        each = max(len(self._encode(question(name, self.hops[-1]) + "\n")) for name in self._names)
        return self.questions * each
