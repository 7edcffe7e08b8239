"""Haystack: base of the tasks that hide a few sentences among many others."""

import random
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from .long_text import LongText
from .managers import NAMES

ADJECTIVES = (
    *("amber", "ancient", "bitter", "blue", "brave", "bright", "broken", "calm", "clever", "cold", "crooked", "dark"),
    *("distant", "double", "dusty", "early", "empty", "famous", "foreign", "frozen", "gentle", "golden", "green"),
    *("happy", "heavy", "hidden", "hollow", "humble", "lazy", "little", "lonely", "lucky", "modern", "narrow", "noisy"),
    *("orange", "patient", "plain", "polite", "proud", "purple", "quick", "quiet", "rapid", "royal", "rusty", "secret"),
    *("sharp", "silent", "silver", "simple", "sleepy", "smooth", "solid", "steep", "strange", "sunny", "tall", "tidy"),
    *("warm", "wide", "wild", "wooden", "young"),
)
NOUNS = (
    *("anchor", "apple", "arrow", "barrel", "basket", "bell", "blanket", "bottle", "bridge", "bucket", "button"),
    *("candle", "carpet", "castle", "chair", "chapel", "circle", "corner", "cottage", "desert", "diamond", "dragon"),
    *("engine", "feather", "fence", "forest", "fountain", "garden", "hammer", "harbour", "island", "jacket", "kettle"),
    *("ladder", "lantern", "lemon", "letter", "market", "mirror", "mountain", "needle", "orchard", "palace", "pencil"),
    *("piano", "pillow", "planet", "pocket", "river", "saddle", "shadow", "shelter", "spoon", "station", "stone"),
    *("temple", "ticket", "tower", "tunnel", "valley", "violin", "wagon", "window", "winter"),
)
SLOTS = {
    "adjective": ADJECTIVES,
    "noun": NOUNS,
    "person": NAMES,
    "stood": ("stood", "lay", "was left", "was found", "was painted", "was lost", "was sold", "was built", "fell"),
    "place": (
        *("by the road", "near the school", "behind the church", "under the trees", "at the border", "in the north"),
        *("on the hill", "beside the lake", "across the street", "in the village", "at home", "outside the town"),
    ),
    "took": (
        "took",
        "drew",
        "cleaned",
        "wanted",
        "kept",
        "forgot",
        "borrowed",
        "described",
        "photographed",
        "repaired",
    ),
    "time": (
        *("In spring", "In autumn", "Last year", "On Monday", "On Friday", "At noon", "At night", "After lunch"),
        *("Before dinner", "For weeks", "Once", "Every summer", "Long ago", "That morning", "Some days later"),
    ),
}
FORMS = (
    "The {adjective} {noun} {stood} {place}.",
    "{person} {took} the {adjective} {noun}.",
    "{time}, {person} {took} the {noun} {place}.",
    "{time}, the {noun} {stood} near the {adjective} {noun}.",
    "{person} and {person} talked about the {adjective} {noun}.",
    "Nobody {place} {took} the {noun} of {person}.",
)
NOISE = (
    *(" The door is open.", " The lamp is on.", " The road is long.", " We walk and we talk."),
    " So it was and so it is.",
)


def draw_sentence(rng: random.Random) -> str:
    """Any of a hundred million short sentences."""
    return " " + re.sub(r"\{(\w+)\}", lambda slot: rng.choice(SLOTS[slot[1]]), rng.choice(FORMS))


def cut(text: str) -> list[str]:
    """Cut text into sentences, each on one line, with the space before it; a paragraph's end ends a sentence too."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    sentence = re.compile(r"""\S(?:.*?[.!?]["'”’)\]]*(?= |$)|.*)""")
    return [f" {found}" for paragraph in paragraphs for found in sentence.findall(paragraph)]


@dataclass(frozen=True)
class Haystack(LongText):
    """Sentences hidden among those of a haystack.

    Args:
        haystack: the name of a kind, or any text. `"sentences"` are drawn from a small grammar; `"noise"` is five
            sentences, again and again; a text is cut into sentences and read from a random one on, in a circle.
    """

    kinds: ClassVar[tuple[str, ...]] = ("sentences", "noise")
    """Names that `haystack` can be."""

    haystack: str = "sentences"

    def __post_init__(self) -> None:
        super().__post_init__()
        works = isinstance(self.haystack, str) and (self.haystack in self.kinds or len(self._cut) > 1)
        self._require("haystack", works, f"it must be one of {self.kinds}, or a text of at least two sentences")
        if self._cut:
            longest = max(map(len, self.tokenizer(self._cut, add_special_tokens=False)["input_ids"]))
            self._check_window("the longest sentence of its haystack", longest)

    @property
    @abstractmethod
    def _opening(self) -> str:
        """The text's beginning."""

    @property
    @abstractmethod
    def _longest(self) -> int:
        """The most tokens of a hidden sentence."""

    def _straw(self, rng: random.Random) -> Iterator[str]:
        """Sentences of the haystack, without end."""
        if self.haystack == "sentences":
            while True:
                yield draw_sentence(rng)
        circle = NOISE if self.haystack == "noise" else self._cut
        at = 0 if self.haystack == "noise" else rng.randrange(len(circle))
        while True:
            yield circle[at]
            at = (at + 1) % len(circle)

    @cached_property
    def _cut(self) -> list[str]:
        """The sentences of a haystack that is a text."""
        return [] if self.haystack in self.kinds else cut(self.haystack)

    @cached_property
    def _slots(self) -> int:
        """Hidden sentences that any window has room for."""
        return (self.window_size - self._opened) // self._longest

    @cached_property
    def _opened(self) -> int:
        return len(self._start) + len(self._encode(self._opening))

    def _check_slots(self, what: str, least: int) -> None:
        self._check_window(what, self._opened + least * self._longest)

    def _in_windows(self, hidden: Mapping[int, str]) -> list[list[str]]:
        """Per window the sentences of its slots; slots are numbered through all windows."""
        windows: list[list[str]] = [[] for _ in range(self.windows)]
        for slot in sorted(hidden):
            windows[slot // self._slots].append(hidden[slot])
        return windows
