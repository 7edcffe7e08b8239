"""CommonWords and FrequentWords: remember how often words came in a long list, and name those that came most."""

import math
import random
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from string import ascii_lowercase

from .long_text import LongText, Told
from .needle import draw_others

FIRST = (
    *("arch", "barn", "beam", "bear", "bell", "belt", "bird", "blue", "boat", "bone", "book", "calm", "cave", "clay"),
    *("coal", "coat", "cold", "cool", "corn", "crow", "dark", "dawn", "deer", "door", "dove", "drum", "dusk", "dust"),
    *("east", "farm", "fern", "fire", "fish", "flag", "foam", "fork", "frog", "gate", "goat", "gold", "gray", "hare"),
    *("hawk", "hill", "iron", "jade", "kite", "lake", "lamb", "lamp", "leaf", "lime", "lion", "long", "mild", "milk"),
    *("mint", "mist", "moon", "moss", "nest", "pear", "rain", "wolf"),
)
SECOND = (
    *("bank", "base", "bath", "bowl", "cake", "card", "cart", "comb", "cook", "cord", "crew", "desk", "dish", "dock"),
    *("fold", "folk", "girl", "hall", "hand", "head", "helm", "hive", "home", "hook", "horn", "knot", "land"),
    *("lane", "line", "lock", "loft", "mark", "maze", "mill", "mine", "nail", "note", "park", "path", "peak", "pine"),
    *("pipe", "plan", "pole", "pond", "pool", "port", "post", "ring", "road", "rock", "roof", "room", "root", "rope"),
    *("sail", "seed", "ship", "shop", "side", "song", "wall", "wood"),
)
WORDS = tuple(first + second for first in FIRST for second in SECOND)
"""Words of 8 letters, none of which stands in another one."""
DOTS = " ..."
MOST_TIMES = 1_000


@dataclass(frozen=True)
class WordCounts(LongText):
    """A list of words in random order that fills all windows, and a question for those that came most often."""

    @property
    def difficulties(self) -> tuple[int, ...]:
        return (self.windows,)

    @property
    @abstractmethod
    def _opening(self) -> str:
        """The text's beginning."""

    @property
    @abstractmethod
    def _question(self) -> str:
        """All that comes after the text, up to where the answer begins."""

    def _dealt(self, rng: random.Random, words: list[str]) -> list[list[str]]:
        """The words in random order, each in the first window after the last one's that has room for it."""
        rng.shuffle(words)
        windows: list[list[str]] = [[]]
        room = self.window_size - self._opened
        for word in words:
            room -= self._tokens(word)
            if room < 0:
                windows.append([])
                room = self.window_size - self._tokens(word)
            windows[-1].append(word)
        return windows + [[] for _ in range(self.windows - len(windows))]

    def _room(self, longest: int) -> int:
        """Tokens of words, of which none has more than `longest`, that fit in whatever order they come."""
        return self.windows * (self.window_size - longest + 1) - self._opened

    def _tokens(self, word: str) -> int:
        return len(self._encode(word))

    @cached_property
    def _opened(self) -> int:
        return len(self._start) + len(self._encode(self._opening))

    def _told(self, windows: list[list[str]], filler: Callable[[], str], answers: Sequence[str]) -> Told:
        return Told(self._opening, windows, filler, self._question, answers, self.windows)


@dataclass(frozen=True)
class CommonWords(WordCounts):
    """A list of words, `common` of which come `common_times`, and a question for these.

    All others come `rare_times`, but for the last few that fill the windows, which come less often. Words are those of
    a list, made up and none within another, that take no more tokens than half of it. `difficulty` is `windows`.

    Words come in random order, so the last window alone tells much of the answer. More windows make the task longer
    rather than harder.

    Args:
        common: words that are asked for.
        common_times: how often each of them comes. By default 30, as in RULER; 6, as there for short texts, where 30
            are more than half of the text; and ten times `rare_times` where these are above 3.
        rare_times: how often each other word comes. By default 3; with 6 once; and more where the text is so long that
            there are too few words.

    Raises:
        ValueError: naming the field, what it got and what would work.

    Source: Hsieh et al. 2024, RULER (arXiv 2404.06654), § 3.3. Its list is numbered, which takes most of the tokens,
    and has an example before it.
    """

    common: int = 10
    common_times: int | None = None
    rare_times: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_int("common", 1, len(self._words) // 2)
        if self.rare_times is not None:
            self._require_int("rare_times", 1)
        if self.common_times is not None:
            self._require_int("common_times", self._times[1] + 1)
        self._check_window("its question and answer", self._tokens(self._question) + self._answer_length)
        common_times, rare_times = self._times
        most = max(self._room(self._longest) // (self.common * self._longest), 0)
        self._require("common_times", common_times <= most, f"{most} of each word fit in the windows")
        works = common_times > rare_times
        self._require("rare_times", works, f"it must be below common_times, which are {common_times}")
        if not self._suffices(rare_times):
            enough = next(filter(self._suffices, range(1, common_times)), "more, with larger common_times")
            self._require("rare_times", False, f"{len(self._words)} words are known, too few: it must be {enough}")

    @property
    def new_tokens(self) -> int:
        """RULER's 120 tokens, or as many as the longest answer has."""
        return max(120, self._answer_length)

    def chance(self, difficulty: int) -> float:
        """Share of the list of words that a guesser can say who knows it: the shortest, until the tokens are used up.

        For each word of the list is as likely as any other to be common.
        """
        ends = accumulate(sorted(map(self._tokens, self._words)))
        return sum(end <= self.new_tokens for end in ends) / len(self._words)

    def _tell(self, rng: random.Random) -> Told:
        words = rng.sample(self._words, len(self._words))
        common, others = words[: self.common], iter(words[self.common :])
        common_times, rare_times = self._times
        listed = common * common_times
        room = self._room(self._longest) - sum(map(self._tokens, listed))
        while room >= rare_times * self._longest:
            word = next(others)
            room -= rare_times * self._tokens(word)
            listed += [word] * rare_times
        windows = self._dealt(rng, listed)
        first_seen = dict.fromkeys(word for window in windows for word in window)
        return self._told(windows, others.__next__, [word.strip() for word in first_seen if word in common])

    @cached_property
    def _times(self) -> tuple[int, int]:
        """How often each common word comes, and each other one."""
        is_short = 2 * self.common * 30 * self._longest > self._room(self._longest)
        rare = 1 if is_short else next(filter(self._suffices, range(3, MOST_TIMES)), MOST_TIMES)
        rare = rare if self.rare_times is None else self.rare_times
        common = 6 if is_short else 10 * max(rare, 3)
        return common if self.common_times is None else self.common_times, rare

    def _suffices(self, rare_times: int) -> bool:
        """Whether the words last for a text, and once each for what is left at the ends of windows."""
        left = (self.windows + rare_times) * self._longest
        others = sum(map(self._tokens, self._words)) - self.common * self._longest
        return rare_times * (others - left) > self._room(self._longest)

    @property
    def _opening(self) -> str:
        return "This is a list of words. Some come often and others seldom. Remember those that come often."

    @property
    def _question(self) -> str:
        asked = "word is" if self.common == 1 else f"{self.common} words are"
        return f"\nQuestion: Which {asked} the most common in the list?\nAnswer: The most common {asked}"

    @cached_property
    def _words(self) -> tuple[str, ...]:
        """The words that take no more tokens than half of them, each with the space before it."""
        spaced = [f" {word}" for word in WORDS]
        limit = sorted(map(self._tokens, spaced))[len(spaced) // 2]
        return tuple(word for word in spaced if self._tokens(word) <= limit)

    @cached_property
    def _longest(self) -> int:
        return max(map(self._tokens, self._words))

    @cached_property
    def _answer_length(self) -> int:
        """Most tokens of an answer."""
        return self.common * (self._longest + self._tokens(",")) + len(self._end)


@dataclass(frozen=True)
class FrequentWords(WordCounts):
    """A text of coded words whose frequencies follow a zeta distribution, and a question for the three most frequent.

    Of n words the k-th most frequent comes n k^-alpha / zeta(alpha) times, rounded down. The first is `...`, which is
    not asked about and fills the windows; the next three are. n is as large as the windows allow. `difficulty` is
    `windows`.

    Args:
        alpha: of the distribution, above 1; the larger, the rarer the words after the first.
        letters: of a coded word, drawn at random.

    Raises:
        ValueError: naming the field, what it got and what would work.

    Source: Hsieh et al. 2024, RULER (arXiv 2404.06654), § 3.3, and its code for the dots.
    """

    alpha: float = 2.0
    letters: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        works = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool) and 1 < self.alpha <= 10
        self._require("alpha", works, "it must be a number above 1, at most 10")
        self._require_int("letters", 3, 100)
        longest = self.letters + 1
        self._check_window("its question and answer", self._tokens(self._question) + self._answer_length)
        fewest = math.ceil(self._zeta / (4**-self.alpha - 5**-self.alpha))
        needed = self._cost(fewest, [longest] * len(self._counts(fewest))) + self._opened
        least = -(-needed // self.windows) + longest - 1
        works = self.window_size >= least
        self._require("window_size", works, f"it must be at least {least}, for the frequencies to differ")

    @property
    def new_tokens(self) -> int:
        """RULER's 50 tokens, or as many as the longest answer has."""
        return max(50, self._answer_length)

    def chance(self, difficulty: int) -> float:
        """Share of all words of that many letters that a guesser says who says another one with each token."""
        return min(1.0, self.new_tokens / len(ascii_lowercase) ** self.letters)

    def _tell(self, rng: random.Random) -> Told:
        most = int(self._room(1) * self._zeta / self._tokens(DOTS)) + 1
        words = draw_others(lambda: self._draw(rng), (), len(self._counts(most)))
        lengths = list(map(self._tokens, words))
        n = bisect_right(range(most), self._room(max(lengths)), key=lambda n: self._cost(n, lengths)) - 1
        listed = [word for word, times in zip([DOTS, *words], self._counts(n), strict=False) for _ in range(times)]
        return self._told(self._dealt(rng, listed), lambda: DOTS, [word.strip() for word in words[:3]])

    def _draw(self, rng: random.Random) -> str:
        return " " + "".join(rng.choices(ascii_lowercase, k=self.letters))

    def _counts(self, n: int) -> list[int]:
        """How often each word comes among n, the most frequent first."""
        ranks = int((n / self._zeta) ** (1 / self.alpha)) + 1
        times = (int(n * rank**-self.alpha / self._zeta) for rank in range(1, ranks + 1))
        return [time for time in times if time]

    def _cost(self, n: int, lengths: Sequence[int]) -> int:
        """Tokens of n words, where those after the dots have `lengths`."""
        lengths = [self._tokens(DOTS), *lengths]
        return sum(times * length for times, length in zip(self._counts(n), lengths, strict=False))

    @property
    def _opening(self) -> str:
        return "This is a text in code. Remember which of its words come most often, the dots aside."

    @property
    def _question(self) -> str:
        answer = "The three most frequent words are"
        return f"\nQuestion: Which three words came most often, the dots aside?\nAnswer: {answer}"

    @cached_property
    def _zeta(self) -> float:
        """Riemann's zeta of alpha: the first terms, and the integral over the others."""
        terms = 1_000
        return sum(k**-self.alpha for k in range(1, terms)) + (terms - 0.5) ** (1 - self.alpha) / (self.alpha - 1)

    @cached_property
    def _answer_length(self) -> int:
        """Most tokens of an answer."""
        return 3 * (self.letters + 1 + self._tokens(",")) + len(self._end)
