"""GSM-Infinite: remember a long text of quantities, then work out the one that is asked for."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise, product
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .task import IGNORED, Row, Task

MODES = ("forward", "reverse")
NOISES = ("disjoint", "overlapping")
MAX_OPS = 30
MAX_VALUE = 99
MAX_TOKENS = 50_000  # before names could run out
UNKNOWN_WEIGHTS = (35, 27, 21, 17)  # of 1, 2, 3, 4: the commonest about as common as in the original
SAMPLES = 1000
PLACES = 4
RECENT = 6


@dataclass(frozen=True)
class Template:
    """The words of a setting: kinds are an adjective and a noun (its plural ends in s), places a first and a second."""

    whole: str
    part: str
    at: str
    adjectives: str
    nouns: str
    first: str
    second: str

    @cached_property
    def kinds(self) -> list[str]:
        return self._pairs(self.adjectives, self.nouns)

    @cached_property
    def places(self) -> list[str]:
        return self._pairs(self.first, self.second)

    @staticmethod
    def _pairs(first: str, second: str) -> list[str]:
        return [f"{a} {b}".replace("_", " ") for a, b in product(first.split(), second.split())]

    def phrase(self, form: str, place: str, kind: str = "") -> str:
        if form == "count":
            what = f"number of {kind}s"
        elif form == "average":
            what = f"average number of {self.part} per {kind}"
        else:
            what = f"total number of {self.whole if form == 'total' else self.part}"
        return f"{what} {self.at} {place}"


TEMPLATES = {
    "animals": Template(
        *("animals", "young", "in"),
        "striped spotted tawny snowy dwarf crested northern marbled",
        "heron badger otter falcon tortoise gecko marmot lemur pelican iguana hedgehog stoat",
        "Fernbrook Saltmarsh Alder Quarry Windmill Harrow Juniper Millpond Cobble Thistle Larkspur Bracken",
        "Reserve Sanctuary Park Gardens Wetland Menagerie Aviary Grounds",
    ),
    "schools": Template(
        *("schools", "teachers", "in"),
        "small coastal bilingual boarding municipal independent suburban historic",
        "primary_school trade_school drama_school riding_school night_school lyceum college seminar institute "
        "conservatoire gymnasium workshop",
        "Upper Lower Great Little Old New Royal Abbey Castle Market Temple Bishops",
        "Thornby Marsden Harwick Stanmoor Ellerton Wexcombe Dunfold Pinsley",
    ),
    "films": Template(
        *("films", "nominations", "at"),
        "silent animated low-budget experimental wartime alpine subtitled restored",
        "western musical romance biopic satire farce melodrama fable epic heist_film ghost_film spy_film",
        "Lantern Harbour Marigold Compass Copper Velvet Saffron Meridian Tramway Orchard Comet Lighthouse",
        "Film_Festival Film_Week Screen_Days Film_Prize Cinema_Forum Reel_Awards Film_Gala Picture_Show",
    ),
}
NUM_NAMES = 96  # kinds of a setting, and places


class Shape(NamedTuple):
    """What a quantity is: a form over different operands, and how a constant before it is applied."""

    form: str
    arity: int = 0
    prefix: str = ""

    @property
    def cost(self) -> int:
        """In-degree: operands and constant. A constant alone, or the unknown, is one."""
        return max(self.arity + bool(self.prefix), 1)


CONSTANT, UNKNOWN = Shape("constant"), Shape("unknown")
FORMS = {("sum", 1): 4, ("sum", 2): 4, ("difference", 2): 4, ("sum", 3): 2}
PREFIXES = {"": 2, "plus": 1, "times": 1}
TOLD = {CONSTANT: 12} | {Shape(*f, p): v * w for (f, v), (p, w) in product(FORMS.items(), PREFIXES.items())}
# The operands of a total are the counts of a place; of a weighted one, count and average of each of its kinds in turn.
TOTALS = {Shape(*s): w for s, w in {("total", 1): 2, ("total", 2): 6, ("total", 3): 4}.items()}
TOTALS |= {Shape("weighted", 2): 4, Shape("weighted", 4): 4}


@dataclass(slots=True, eq=False)
class Node:
    """A quantity. `values` has one entry or, where there is an unknown, one for each of 1, 2, 3, 4 it may be."""

    shape: Shape
    constant: int
    operands: list["Node"]
    values: tuple[int, ...]
    depth: int = 1
    used: bool = False
    placed: bool = False
    phrase: str = ""

    @property
    def formula(self) -> str:
        the = [f"the {operand.phrase}" for operand in self.operands]
        if self.shape.form == "weighted":
            the = [f"{count} times {average}" for count, average in zip(the[::2], the[1::2], strict=True)]
        if self.shape.form == "difference":
            text = f"the difference between {the[0]} and {the[1]}"
        elif len(the) == 3:
            text = f"the sum of {the[0]}, {the[1]}, and {the[2]}"
        elif len(the) == 2:
            text = f"the sum of {the[0]} and {the[1]}"
        else:
            text = the[0] if the else str(self.constant or "unknown")
        return f"{self.constant} {self.shape.prefix} {text}" if self.shape.prefix else text


def _combine(rng: random.Random, shape: Shape, operands: list[Node], width: int) -> Node | None:
    """A node with `width` values, or None if one, or a difference within it, would not be 1 to `MAX_VALUE`."""
    constant = rng.randint(2 if shape.prefix == "times" else 1, 4)
    if shape == CONSTANT:
        return Node(shape, constant, [], (constant,) * width)
    if shape.form == "difference":
        operands = sorted(operands, key=lambda operand: -operand.values[-1])
    columns = zip(*(operand.values for operand in operands), strict=True)
    if shape.form == "difference":
        values = [a - b for a, b in columns]
    elif shape.form == "weighted":
        values = [sum(a * b for a, b in zip(column[::2], column[1::2], strict=True)) for column in columns]
    else:
        values = [sum(column) for column in columns]
    if min(values) < 1:
        return None
    if shape.prefix:
        values = [constant + value if shape.prefix == "plus" else constant * value for value in values]
    if max(values) > MAX_VALUE:
        return None
    depth = 1 + max(operand.depth for operand in operands)
    return Node(shape, constant, operands, tuple(values), depth, placed=shape in TOTALS)


@lru_cache(maxsize=4096)
def _choices(left: int, num_unused: int, num_used: int, d: int) -> tuple[list[tuple[Shape, int]], list[float]]:
    """The next node's shape and how many of its operands are unused so far, with weights; `left` operations remain."""
    found, weights = [], []
    for shape, weight in (TOLD | TOTALS if d == 3 else TOLD).items():
        for fresh in range(min(shape.arity, 1), min(shape.arity, num_unused) + 1):
            # As many operations make one of all that is then unused: sums of three, and one of two if need be.
            closing = (3 * (num_unused - fresh + 1) - 2) // 2
            if shape.arity - fresh <= num_used and left - shape.cost >= closing:
                found.append((shape, fresh))
                weights.append(weight if fresh == shape.arity else weight / 4)
    return found, weights


def draw_graph(rng: random.Random, op: int, mode: str, d: int) -> tuple[list[Node], int]:
    """The quantities of a problem of exactly `op` operations, each after its operands, and the answer.

    The last one is asked for; in reverse it is stated and the first is asked for. All are needed: those that nothing
    uses yet never add up to more than `MAX_VALUE`, so that summing them always works, and what follows from an unknown
    grows with it.
    """
    reverse, given = mode == "reverse", rng.randint(1, 4)
    nodes = [Node(UNKNOWN, 0, [], (1, 2, 3, 4)) if reverse else Node(CONSTANT, given, [], (given,))]
    left = op - 1
    while left:
        new, old = ([node for node in nodes if node.used == used] for used in (False, True))
        found, weights = _choices(left, len(new), len(old), d)
        weights, node = list(weights), None
        while node is None:
            which = rng.choices(range(len(found)), weights)[0]
            weights[which] = 0
            node = _draw_node(rng, *found[which], new, old)
        for operand in node.operands:
            operand.used = True
            operand.placed |= node.placed
        nodes.append(node)
        left -= node.shape.cost
    return nodes, rng.choices((1, 2, 3, 4), UNKNOWN_WEIGHTS)[0] if reverse else nodes[-1].values[0]


def _draw_node(rng: random.Random, shape: Shape, fresh: int, new: list[Node], old: list[Node]) -> Node | None:
    """A node with `fresh` operands that nothing uses yet; None if it would break what `draw_graph` promises."""
    room, width = MAX_VALUE - sum(node.values[-1] for node in new), len(new[0].values)
    if shape in TOTALS:  # a quantity is in one place, and so in one total
        new, old = ([node for node in nodes if not node.placed] for nodes in (new, old))
    if len(new) < fresh or len(old) < shape.arity - fresh:
        return None
    operands = rng.sample(new, fresh)
    room += sum(operand.values[-1] for operand in operands)
    operands += rng.sample(old, shape.arity - fresh)
    rng.shuffle(operands)
    node = _combine(rng, shape, operands, width)
    if node is None or node.values[-1] > room:
        return None
    follows = any(operand.values[0] != operand.values[-1] for operand in operands)
    return None if follows and any(a >= b for a, b in pairwise(node.values)) else node


@lru_cache(maxsize=1024)
def majority(mode: str, op: int, d: int = 3) -> float:
    """How often the commonest answer is right, in 1,000 seeded graphs: a standard error of at most 0.016."""
    rng = random.Random(f"{mode}/{op}/{d}")
    answers = Counter(draw_graph(rng, op, mode, d)[1] for _ in range(SAMPLES))
    return answers.most_common(1)[0][1] / SAMPLES


@lru_cache(maxsize=64)
def _shapes(modes: tuple[str, ...], d: int) -> tuple[list[Shape], list[int]]:
    """The shapes that occur in problems of 1 to 8 operations, and how often."""
    rng = random.Random(f"{modes}/{d}")
    graphs = [draw_graph(rng, rng.randint(1, 8), rng.choice(modes), d)[0] for _ in range(SAMPLES)]
    found = Counter(node.shape for nodes in graphs for node in nodes if node.shape != UNKNOWN)
    return list(found), list(found.values())


class _Names:
    """Phrases for the quantities of one problem, each given out once: all kinds in a few places."""

    def __init__(self, rng: random.Random, template: Template, d: int, num_kinds: int):
        self.rng, self.template, self.forms = rng, template, ("count", "average")[: d - 1]
        self.kinds = rng.sample(template.kinds, num_kinds)
        self.places = list(template.places)
        self.left: list[str] = []

    def place(self) -> str:
        """A place that was not named yet."""
        return self.places.pop(self.rng.randrange(len(self.places)))

    def draw(self) -> str:
        if not self.left:
            places = [self.place() for _ in range(PLACES)]
            self.left = [self.template.phrase(*names) for names in product(self.forms, places, self.kinds)]
            self.rng.shuffle(self.left)
        return self.left.pop()

    def draw_total(self, shape: Shape) -> tuple[str, list[str]]:
        """A total and its operands, in a new place where there are no other kinds."""
        place, forms = self.place(), ("count", "average") if shape.form == "weighted" else ("count",)
        kinds = self.rng.sample(self.kinds, shape.arity // len(forms))
        operands = [self.template.phrase(form, place, kind) for kind, form in product(kinds, forms)]
        return self.template.phrase(shape.form, place), operands

    def name(self, nodes: list[Node]) -> None:
        for node in nodes:
            if node.shape in TOTALS:
                node.phrase, operands = self.draw_total(node.shape)
                for operand, phrase in zip(node.operands, operands, strict=True):
                    operand.phrase = phrase
        for node in nodes:
            node.phrase = node.phrase or self.draw()


def _distractors(
    rng: random.Random, names: _Names, problem: list[Node], modes: tuple[str, ...], d: int
) -> Iterator[str]:
    """Sentences without end, each about a new quantity, shaped like those of problems.

    What is made of others follows from the problem, directly or through other distractors. Operands are recent ones, or
    the problem's would soon be the most spoken of.
    """
    recent, width = rng.sample(problem, len(problem)), len(problem[0].values)
    following = list(recent)
    shapes, weights = _shapes(modes, d)

    def add(node: Node, phrase: str) -> str:
        node.phrase = phrase
        recent.append(node)
        following.extend([node] if any(operand in following for operand in node.operands) else [])
        return f"The {phrase} equals {node.formula}."

    def tell(phrase: str) -> str:
        node = None
        while node is None:
            shape = rng.choices(shapes, weights)[0]
            if shape in TOLD and shape.arity <= len(recent):
                first = rng.choice(following[-RECENT:])
                others = [other for other in recent[-RECENT:] if other is not first]
                operands = [first, *rng.sample(others, max(shape.arity - 1, 0))][: shape.arity]
                node = _combine(rng, shape, rng.sample(operands, shape.arity), width)
        return add(node, phrase)

    while True:
        shape = rng.choices(shapes, weights)[0]
        if shape in TOLD or len(names.places) <= NUM_NAMES // 2:
            yield tell(names.draw())
        else:
            total, operands = names.draw_total(shape)
            yield from map(tell, operands)
            node = _combine(rng, shape, recent[-shape.arity :], width)
            if node is not None:
                add(node, total)


@dataclass(frozen=True)
class Problem:
    """A problem as text.

    Attributes:
        question: one sentence.
        sentences: in the order in which they are told, which is random.
        needed: of each sentence, whether it is part of the problem; the others are distractors.
        answer: 1 to 99; in a reverse problem 1 to 4.
        op: operations: in-degrees summed over the needed quantities. A constant is one, and so is the unknown.
        mode: `"forward"` or `"reverse"`.
        depth: quantities on the longest chain up to the one asked for (reverse: stated). At most `op`.
        template: a key of `TEMPLATES`.
        solution: the needed quantities in an order of solution, with values (reverse: for an unknown of 1, 2, 3, 4).
        question_first: whether the question comes before the sentences.
    """

    question: str
    sentences: tuple[str, ...]
    needed: tuple[bool, ...]
    answer: int
    op: int
    mode: str
    depth: int
    template: str
    solution: tuple[str, ...]
    question_first: bool = True

    @property
    def prompt(self) -> str:
        """All that is read before the answer."""
        parts = [f"Question: {self.question}", " ".join(self.sentences)]
        return "\n".join([*(parts if self.question_first else parts[::-1]), "Answer:"])


@lru_cache(maxsize=4096)
def _word_length(word: str, tokenizer: PreTrainedTokenizerBase) -> int:
    both, one = tokenizer([f"a {word}", "a"], add_special_tokens=False)["input_ids"]
    return len(both) - len(one)


def _count(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a text within another: exact unless a token spans words."""
    return sum(_word_length(word, tokenizer) for word in text.split())


@lru_cache(maxsize=1)  # a prompt is counted first, and then made a row of
def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return tuple(tokenizer(text, verbose=False)["input_ids"])


@dataclass(frozen=True)
class GSMInfinite(Task):
    """Grade-school arithmetic of a known number of operations, in a text of any length.

    A problem is an acyclic graph of quantities, one to a sentence (`The X equals 2 plus the sum of the Y and the Z.`),
    told in random order. A forward problem asks for one of them. A reverse problem has an unknown from 1 to 4, states
    what becomes of it, and asks for it; what is stated grows with the unknown, so that one value fits. With d = 2
    quantities are counts of a kind in a place; d = 3 adds averages, and totals of a place: the sum of its counts, or of
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
        """How often the commonest answer of a mode is right at `difficulty` operations; by default the modes' mean."""
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
        names = _Names(rng, TEMPLATES[setting], self.d, self._num_kinds)
        names.name(nodes)
        if self.noise == "disjoint":
            names.left.clear()
        distractors = _distractors(rng, names, nodes, self.modes, self.d)
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
                missing -= _count(sentence, self._tokenizer)

    def encode(self, problem: Problem) -> Row:
        """A problem as a row."""
        prompt, target = _encode(problem.prompt, self._tokenizer), self._target(problem.answer)
        row: Row = {"input_ids": [*prompt, *target], "labels": [IGNORED] * len(prompt) + target}
        row |= {"difficulty": problem.op, "answer": problem.answer}
        return row | {"mode": problem.mode, "depth": problem.depth, "template": problem.template}

    def exact_match(self, generated: list[int], row: Row) -> bool:
        """Whether tokens generated after the prompt are, up to EOS, the answer and nothing else."""
        ids = [*generated, self._tokenizer.eos_token_id]
        text = self._tokenizer.decode(ids[: ids.index(self._tokenizer.eos_token_id)])
        return text.strip() == str(row["answer"])

    def _make(self, rng: random.Random, split: str) -> Row:
        return self.encode(self.problem(rng))

    def _target(self, answer: int) -> list[int]:
        return [*self._tokenizer(f" {answer}", add_special_tokens=False)["input_ids"], self._tokenizer.eos_token_id]

    def _missing(self, problem: Problem, target: int) -> int:
        """Tokens that the prompt lacks to be `target` long, and to end in the window in which the answer ends."""
        size = len(_encode(problem.prompt, self._tokenizer))
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
        """As many as fill a prompt with sentences of a quarter of the longest; at least 4."""
        fill = 4 * self.tokens[1] // (PLACES * (self.d - 1) * self._longest[1]) if self.tokens[1] else 0
        return min(max(fill, 4), NUM_NAMES)

    @cached_property
    def _longest(self) -> tuple[int, int]:
        """Most tokens of a prompt without distractors, and of a sentence."""
        prompts, sentences = [], []
        for template in (TEMPLATES[name] for name in self.templates):
            form = "average" if self.d == 3 else "count"
            kind = max(template.kinds, key=lambda kind: _count(template.phrase(form, "", kind), self._tokenizer))
            place = max(template.places, key=lambda place: _count(place, self._tokenizer))
            the = f"the {template.phrase(form, place, kind)}"
            told = [f"It turns out that {the} is 99. {the} is still unknown.", *[f"{the} equals {the}."] * self.ops[1]]
            prompts.append(len(_encode(f"Question: What is {the}?\n{' '.join(told)}\nAnswer:", self._tokenizer)))
            sentences.append(_count(f"{the} equals 4 times the sum of {the}, {the}, and {the}.", self._tokenizer))
        return max(prompts), max(sentences)
