"""The task: problems of a drawn length as rows of tokens."""

import random
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from transformers import PreTrainedTokenizerBase

from ...labels import IGNORED
from ..task import Row, Task
from ..words import start_of
from .graph import MAX_VALUE, MODES, TOLD, draw_graph, majority
from .text import PLACES, Names, Problem, endless_distractors
from .words import NUM_NAMES, TEMPLATES

NOISES = ("disjoint", "overlapping")
MAX_OPS = 30
MAX_TOKENS = 50_000  # before names could run out


@lru_cache(maxsize=4096)
def _word_length(word: str, tokenizer: PreTrainedTokenizerBase) -> int:
    both, one = tokenizer([f"a {word}", "a"], add_special_tokens=False)["input_ids"]
    return len(both) - len(one)


def count(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a text within another: exact unless a token spans words."""
    return sum(_word_length(word, tokenizer) for word in text.split())


@lru_cache(maxsize=1)  # a prompt is counted first, and then made a row of
def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return (*start_of(tokenizer), *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@dataclass(frozen=True)
class GSMInfinite(Task):
    """Grade-school arithmetic of a known number of operations, in a text of any length.

    A problem is an acyclic graph of quantities, one to a sentence (`The X equals 2 plus the sum of the Y and the Z.`),
    told in random order. A forward problem asks for one of them. A reverse problem has an unknown from 1 to 4, states
    what becomes of it, and asks for it. What is stated grows with the unknown, so that one value fits. With d = 2
    quantities are counts of a kind in a place. d = 3 adds averages, and totals of a place: the sum of its counts, or of
    its counts times averages, which no sentence says. Quantities, and differences in a sentence, are 1 to 99.

    Distractors fill the prompt up to a length that is drawn before the problem and so says nothing about it. They are
    constants, or follow from the problem's quantities, at once or through each other; the problem uses none of them.
    With distractors the prompt never ends where a window does: the window of its last token holds the answer too.

    A row is prompt, answer and EOS, with the loss on the last two. Prompt and answer are tokenised apart: what is
    learned after the prompt comes after `tokenizer(problem.prompt)`. `difficulty` is op; `mode`, `depth` and `template`
    are told as in `Problem`.

    Args:
        tokenizer: needed for rows and for distractors.
        ops: fewest and most operations of a problem, up to 30; all equally likely.
        modes: `"forward"`, `"reverse"` or both, equally likely.
        d: levels of quantities, 2 or 3.
        templates: out of `"animals"`, `"schools"` and `"films"`, equally likely.
        noise: `"disjoint"`: distractors are about other places than the problem, as in the original. `"overlapping"`:
            about the same kinds in the same places, other than those whose total is asked for or used.
        tokens: fewest and most tokens of a prompt, or `(0, 0)`: no distractors, and lengths that grow with op.
        question_first: whether the question comes before the sentences.
        window_size: L, in tokens.

    Raises:
        ValueError: naming the field, what it got and what would work.

    Source: after Zhou et al. 2025, GSM-Infinite (arXiv 2502.05252), with words and a generator of our own; defaults
    from Lee et al. 2026 (arXiv 2605.26099), the GSM-Infinite experiment, which leaves d open.
    """

    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)
    ops: tuple[int, int] = (1, 8)
    modes: tuple[str, ...] = MODES
    d: int = 3
    templates: tuple[str, ...] = tuple(TEMPLATES)
    noise: str = "disjoint"
    tokens: tuple[int, int] = (2000, 3300)
    question_first: bool = True
    window_size: int = 2000

    def __post_init__(self) -> None:
        for name, least, most in (("ops", 1, MAX_OPS), ("tokens", 0, MAX_TOKENS)):
            pair = getattr(self, name)
            works = isinstance(pair, tuple) and len(pair) == 2 and all(type(item) is int for item in pair)
            works = works and least <= pair[0] <= pair[1] <= most
            self._require(name, works, f"it must be (fewest, most), integers from {least} to {most}")
        for name, known in (("modes", MODES), ("templates", tuple(TEMPLATES))):
            value = getattr(self, name)
            works = isinstance(value, tuple) and bool(value) and set(value) <= set(known)
            self._require(name, works, f"it must be a tuple of some of {known}")
        self._require_int("d", 2, 3)
        self._require("noise", self.noise in NOISES, f"it must be one of {NOISES}")
        self._require("question_first", isinstance(self.question_first, bool), "it must be True or False")
        self._require_int("window_size", 1)
        if self.tokenizer is not None:
            self._require("tokenizer", self.tokenizer.eos_token_id is not None, "its eos_token must be set")
        if self.tokens != (0, 0):
            problem, longest = self._longest
            least = self.tokens[0] + 2 * longest
            self._require("tokens", self.tokens[0] >= problem, f"fewest must be at least {problem}, for a problem")
            self._require("tokens", self.tokens[1] >= least, f"most must be at least {least}, for two sentences")
            least = longest + self._answer_length
            self._require("window_size", self.window_size >= least, f"it must be at least {least}, for a sentence")

    @classmethod
    def paper(cls, tokenizer: PreTrainedTokenizerBase) -> "GSMInfinite":
        """1 to 8 operations in 2,000 to 3,300 tokens, L = 2000."""
        return cls(tokenizer)

    @property
    def vocab_size(self) -> int:
        return max(self._tokenizer.get_vocab().values()) + 1

    @property
    def length(self) -> int:
        return (self.tokens[1] or self._longest[0]) + self._answer_length

    @property
    def difficulties(self) -> tuple[int, ...]:
        return tuple(range(self.ops[0], self.ops[1] + 1))

    def chance(self, difficulty: int, mode: str | None = None) -> float:
        """Share of the commonest answer of a mode at `difficulty` operations; by default the modes' mean."""
        self._check("difficulty", difficulty, difficulty in range(1, MAX_OPS + 1), f"from 1 to {MAX_OPS}")
        self._check("mode", mode, mode in (None, *MODES), f"one of {MODES}, or None")
        modes = self.modes if mode is None else (mode,)
        return sum(majority(each, difficulty, self.d) for each in modes) / len(modes)

    def problem(self, seed: int | random.Random) -> Problem:
        """A problem as text. Without distractors no tokenizer is needed."""
        if not isinstance(seed, random.Random):
            self._check("seed", seed, isinstance(seed, int), "an integer or a random.Random")
            return self.problem(random.Random(seed))
        rng, (fewest, most) = seed, self.tokens
        target = rng.randint(fewest, most - 2 * self._longest[1]) if most else 0
        op, mode, setting = rng.randint(*self.ops), rng.choice(self.modes), rng.choice(self.templates)
        nodes, answer = draw_graph(rng, op, mode, self.d)
        names = Names(rng, TEMPLATES[setting], self.d, self._num_kinds)
        names.name(nodes)
        if self.noise == "disjoint":
            names.left.clear()
        distractors = endless_distractors(rng, names, nodes, self.modes, self.d)
        steps = tuple(f"The {n.phrase} = {n.formula} = {' | '.join(map(str, n.values))}." for n in nodes)
        sentences = [f"The {n.phrase} equals {n.formula}." for n in nodes if n.shape in TOLD]
        asked = nodes[-1].phrase
        if mode == "reverse":
            sentences.append(f"It turns out that the {asked} is {nodes[-1].values[answer - 1]}.")
            asked = nodes[0].phrase
            sentences.append(f"The {asked} is still unknown.")
        told = [(rng.random(), sentence, True) for sentence in sentences]
        while True:
            told.sort()
            problem = Problem(
                question=f"What is the {asked}?",
                sentences=tuple(sentence for _, sentence, _ in told),
                needed=tuple(needed for *_, needed in told),
                answer=answer,
                op=op,
                mode=mode,
                depth=nodes[-1].depth,
                template=setting,
                solution=steps,
                question_first=self.question_first,
            )
            missing = self._missing(problem, target) if target else 0
            if missing <= 0:
                return problem
            while missing > 0:
                sentence = next(distractors)
                told.append((rng.random(), sentence, False))
                missing -= count(sentence, self._tokenizer)

    def encode(self, problem: Problem) -> Row:
        """A problem as a row."""
        prompt, target = encode(problem.prompt, self._tokenizer), self._target(problem.answer)
        row: Row = {"input_ids": [*prompt, *target], "labels": [IGNORED] * len(prompt) + target}
        row |= {"difficulty": problem.op, "answer": problem.answer}
        return row | {"mode": problem.mode, "depth": problem.depth, "template": problem.template}

    def exact_match(self, generated: list[int], row: Row) -> bool:
        """Tell whether tokens generated after the prompt are, up to EOS, the answer and nothing else."""
        ids = [*generated, self._tokenizer.eos_token_id]
        text = self._tokenizer.decode(ids[: ids.index(self._tokenizer.eos_token_id)])
        return text.strip() == str(row["answer"])

    def _make(self, rng: random.Random, split: str) -> Row:
        return self.encode(self.problem(rng))

    def _target(self, answer: int) -> list[int]:
        return [*self._tokenizer(f" {answer}", add_special_tokens=False)["input_ids"], self._tokenizer.eos_token_id]

    def _missing(self, problem: Problem, target: int) -> int:
        """Tokens that the prompt lacks to be `target` long, and to end in the window in which the answer ends."""
        size = len(encode(problem.prompt, self._tokenizer))
        straddles = (size - 1) // self.window_size != (size - 1 + self._answer_length) // self.window_size
        return max(target - size, int(straddles))

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        self._require("tokenizer", self.tokenizer is not None, "rows need one, and problems unless tokens=(0, 0)")
        return self.tokenizer

    @cached_property
    def _answer_length(self) -> int:
        return max(len(self._target(answer)) for answer in range(1, MAX_VALUE + 1))

    @cached_property
    def _num_kinds(self) -> int:
        """Kinds that fill a prompt with sentences of a quarter of the longest; at least 4."""
        fill = 4 * self.tokens[1] // (PLACES * (self.d - 1) * self._longest[1]) if self.tokens[1] else 0
        return min(max(fill, 4), NUM_NAMES)

    @cached_property
    def _longest(self) -> tuple[int, int]:
        """Most tokens of a prompt without distractors, and of a sentence."""
        prompts, sentences = [], []
        for template in (TEMPLATES[name] for name in self.templates):
            form = "average" if self.d == 3 else "count"
            kind = max(template.kinds, key=lambda kind: count(template.phrase(form, "", kind), self._tokenizer))
            place = max(template.places, key=lambda place: count(place, self._tokenizer))
            the = f"the {template.phrase(form, place, kind)}"
            told = [f"It turns out that {the} is 99. {the} is still unknown.", *[f"{the} equals {the}."] * self.ops[1]]
            prompts.append(len(encode(f"Question: What is {the}?\n{' '.join(told)}\nAnswer:", self._tokenizer)))
            sentences.append(count(f"{the} equals 4 times the sum of {the}, {the}, and {the}.", self._tokenizer))
        return max(prompts), max(sentences)
