"""Sentences of a graph: names for its quantities, distractors, and the problem as text."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from .graph import TOLD, TOTALS, Node, Shape, combine, common_shapes
from .words import NUM_NAMES, Template

PLACES = 4
RECENT = 6


class Names:
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


def endless_distractors(
    rng: random.Random, names: Names, problem: list[Node], modes: tuple[str, ...], d: int
) -> Iterator[str]:
    """Sentences without end, each about a new quantity, shaped like those of problems.

    What is made of others follows from the problem, directly or through other distractors. Operands are recent ones, or
    the problem's would soon be the most spoken of.
    """
    recent, width = rng.sample(problem, len(problem)), len(problem[0].values)
    following = list(recent)
    shapes, weights = common_shapes(modes, d)

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
                node = combine(rng, shape, rng.sample(operands, shape.arity), width)
        return add(node, phrase)

    while True:
        shape = rng.choices(shapes, weights)[0]
        if shape in TOLD or len(names.places) <= NUM_NAMES // 2:
            yield tell(names.draw())
        else:
            total, operands = names.draw_total(shape)
            yield from map(tell, operands)
            node = combine(rng, shape, recent[-shape.arity :], width)
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
