"""Facts: who moved where, took, set down and handed over what, among sentences of no consequence; and a question."""

import random
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import count, pairwise

from .long_text import LongText, Told
from .stories import PEOPLE, QUESTIONS, ROOMS, SUPPORTS, THINGS, WORDING, Act, Story, ask, sentence, tell
from .task import Row

KINDS = tuple(SUPPORTS)
SCENES = (
    *("The wind", "A distant bell", "The smell of rain", "The evening light", "The noise of the road", "A light fog"),
    *("The talk of the town", "Some music", "The barking of a dog", "A smell of smoke", "The heat", "The silence"),
    *("A flock of geese", "The song of a blackbird", "The sound of the river", "A cold draught"),
)
HAPPENED = (
    *("came and went", "was hardly noticed", "was soon forgotten", "changed little", "was much the same as ever"),
    *("seemed to come nearer", "lasted for a while", "surprised nobody", "seemed far away", "was pleasant enough"),
)
DID = (
    *("hummed an old song", "thought of the sea", "told a long joke", "spoke of the weather", "said very little"),
    *("remembered a summer long ago", "asked what time it was", "felt a little tired", "talked about supper"),
    *("whistled quietly", "laughed about nothing", "was in a good mood"),
)
WHEN = (
    *("that day", "towards noon", "in those days", "as so often", "while it rained outside", "before the holidays"),
    *("after a short rest", "as on any other day", "in spite of everything", "without a reason", "later on"),
)


@dataclass(frozen=True)
class Facts(LongText):
    """Facts about people, rooms and things in a text of `windows` windows, and a question that some of them answer.

    `Alma entered the attic. Alma took hold of the lamp. ...`, spread over the windows at random. Sentences of no
    consequence, half of them about the same people, fill the windows. Each row has one question, of a kind that is
    drawn from `kinds`, all equally likely:

    - `"one"`: where a person is. By the person's last move.
    - `"two"`: where a thing is. By the last to get it, or to set it down, and a move of that person.
    - `"three"`: where a thing was before it was in a room. By who had it, and two moves.
    - `"yes_no"`: whether a person is in a room, that or the one where the person was before. By the last move.
    - `"counting"`: how many things a person carries, none to four. By the four times that this changed.

    `difficulty` is the number of these supporting facts, `kind` the kind, and `choices` the words that might be the
    answer. Where supporting facts stand is drawn first, and nothing that is told later changes the answer. So they are
    anywhere in the text, and not mostly at its end. How often a room is named says nothing about the answer.

    An answer is right when, of the `choices`, its first sentence has the right one and no other.

    Args:
        tokenizer: of the model.
        windows: of text.
        window_size: L, in tokens.
        kinds: of questions.
        facts: in a text.
        people: in a text, out of a list.
        things: in a text, out of a list.
        rooms: in a text, out of a list. The text begins with their names.

    Raises:
        ValueError: naming the field, what it got and what would work.

    Source: our own, with the kinds of questions of tasks 1, 2, 3, 6 and 7 of Weston et al. 2015 (arXiv 1502.05698),
    told in a long text and judged as in Kuratov et al. 2024, BABILong (arXiv 2406.10149).
    """

    new_tokens = 16

    kinds: tuple[str, ...] = KINDS
    facts: int = 24
    people: int = 4
    things: int = 6
    rooms: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        works = isinstance(self.kinds, tuple) and bool(self.kinds) and set(self.kinds) <= set(KINDS)
        works = works and len(set(self.kinds)) == len(self.kinds)
        self._require("kinds", works, f"it must be a tuple of some of {KINDS}")
        self._require_int("facts", 8)
        self._require_int("people", 2, len(PEOPLE))
        self._require_int("things", 4, len(THINGS))
        self._require_int("rooms", 3, len(ROOMS))
        fewest = max(self._asked_length, self._begun_length)
        least = next(size for size in count(fewest) if sum(self._room_for(size)) >= self.facts)
        works = self.window_size >= least
        self._require("window_size", works, f"it must be at least {least}, for the facts and the question")

    @property
    def difficulties(self) -> tuple[int, ...]:
        return tuple(sorted({SUPPORTS[kind] for kind in self.kinds}))

    def chance(self, difficulty: int, kind: str | None = None) -> float:
        """Share of right guesses among the words that may be the answer; by default the mean of a difficulty's kinds.

        They are the rooms of the text for kinds one and two, all but the one that is asked about for three, yes and no,
        and the numbers.
        """
        self._check("difficulty", difficulty, difficulty in self.difficulties, f"one of {self.difficulties}")
        kinds = tuple(each for each in self.kinds if SUPPORTS[each] == difficulty)
        self._check("kind", kind, kind in (None, *kinds), f"one of {kinds}, or None")
        choices = {"one": self.rooms, "two": self.rooms, "three": self.rooms - 1, "yes_no": 2, "counting": 5}
        asked = kinds if kind is None else (kind,)
        return sum(1 / choices[each] for each in asked) / len(asked)

    def judge(self, said: str, row: Row) -> float:
        """1 where the first sentence of `said` has the answer and no other of the row's choices, else 0.

        Source: Kuratov et al. 2024, BABILong (arXiv 2406.10149), its comparison of answers.
        """
        first = re.split(r"[.!?\n]", said.strip(), maxsplit=1)[0]
        words = set(re.findall(r"\w+", first.lower()))
        return float(words & set(row["choices"]) == set(row["references"]))

    def _tell(self, rng: random.Random) -> Told:
        people, things = rng.sample(PEOPLE, self.people), rng.sample(THINGS, self.things)
        rooms, kind = rng.sample(ROOMS, self.rooms), rng.choice(self.kinds)
        story, question = tell(rng, kind, lambda: Story(people, things, rooms), self.facts)
        facts = [sentence(act, rng.choice(WORDING[act.verb])) for act in story.acts]
        cuts = self._cuts(rng)
        return Told(
            opening=_opening(rooms),
            windows=[facts[start:end] for start, end in pairwise(cuts)],
            filler=lambda: _filler(rng, people),
            question=question.text,
            answers=[question.answer],
            difficulty=SUPPORTS[kind],
            fields={"kind": kind, "choices": list(question.choices)},
        )

    def _cuts(self, rng: random.Random) -> list[int]:
        """Numbers of the facts with which windows begin, and the number of facts: any window may hold any of them."""
        left, cuts = self._room_for(self.window_size), [0] * (self.windows + 1)
        for _ in range(self.facts):
            w = rng.choice([w for w, more in enumerate(left) if more])
            left[w] -= 1
            cuts[w + 1] += 1
        for w in range(self.windows):
            cuts[w + 1] += cuts[w]
        return cuts

    def _room_for(self, window_size: int) -> list[int]:
        """Facts that each window has room for."""
        first = max(0, window_size - self._begun_length) // self._fact_length
        return [first] + [window_size // self._fact_length] * (self.windows - 1)

    def _longest(self, words: tuple[str, ...], number: int) -> list[str]:
        """The words that are most tokens."""
        return sorted(words, key=lambda word: -len(self._encode(f" {word}")))[:number]

    @cached_property
    def _begun_length(self) -> int:
        """Most tokens before the first sentence that is not the opening."""
        return len(self._start) + len(self._encode(_opening(self._longest(ROOMS, self.rooms))))

    @cached_property
    def _fact_length(self) -> int:
        """Most tokens of a fact."""
        (who, to), (room,) = self._longest(PEOPLE, 2), self._longest(ROOMS, 1)
        act = Act("", who, tuple(self._longest(THINGS, 2)), room, to)
        return max(len(self._encode(sentence(act, wording))) for each in WORDING.values() for wording in each)

    @cached_property
    def _asked_length(self) -> int:
        """Most tokens of a question and its answer."""
        (who,), (thing,), (room,) = self._longest(PEOPLE, 1), self._longest(THINGS, 1), self._longest(ROOMS, 1)
        answers = {"yes_no": "yes", "counting": "three"}
        asked = [ask(kind, answers.get(kind, room), (), who=who, thing=thing, room=room) for kind in QUESTIONS]
        return max(len(self._encode(each.text) + self._encode(f" {each.answer}") + self._end) for each in asked)


def _opening(rooms: list[str]) -> str:
    return f"This is what happened in a house with the following rooms: {', '.join(rooms)}."


def _filler(rng: random.Random, people: list[str]) -> str:
    if rng.random() < 0.5:
        return f" {rng.choice(people)} {rng.choice(DID)} {rng.choice(WHEN)}."
    return f" {rng.choice(SCENES)} {rng.choice(HAPPENED)} {rng.choice(WHEN)}."
