"""Stories of people who move between rooms, take, set down and hand over things, and questions about them."""

import random
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, product

PEOPLE = (
    *("Alma", "Boris", "Clara", "Edith", "Felix", "Henry", "Hugo", "Ivy", "Jane", "Leon", "Marcus", "Oscar", "Ralph"),
    *("Rosa", "Ruth", "Simon", "Vera", "Victor"),
)
ROOMS = (
    *("attic", "cellar", "chapel", "gallery", "garage", "laundry", "library", "lobby", "nursery", "pantry", "studio"),
    "workshop",
)
THINGS = (
    *("basket", "blanket", "broom", "bucket", "candle", "coin", "drum", "flute", "hammer", "kettle", "ladder", "lamp"),
    *("map", "mirror", "pillow", "rope", "umbrella", "vase", "violin"),
)
NUMBERS = ("none", "one", "two", "three", "four")
YES_NO = ("yes", "no")
WORDING = {
    "move": ("{who} walked into the {room}.", "{who} entered the {room}.", "{who} came into the {room}."),
    "take": ("{who} collected {things}.", "{who} took hold of {things}.", "{who} gathered up {things}."),
    "drop": ("{who} set down {things}.", "{who} let go of {things}.", "{who} laid down {things}."),
    "hand": ("{who} handed {things} over to {to}.", "{who} entrusted {things} to {to}."),
}
QUESTIONS = {
    "one": ("Where is {who} now?", " {who} is in the"),
    "two": ("Where is the {thing} now?", " The {thing} is in the"),
    "three": ("Where was the {thing} before it was in the {room}?", " Before that, the {thing} was in the"),
    "yes_no": ("Is {who} in the {room} now, yes or no?", ""),
    "counting": ("How many things does {who} carry now: none, one, two, three or four?", ""),
}
TRIES = 100


@dataclass(frozen=True)
class Act:
    """Something that is done: `who` enters `room`, takes or sets down `things`, or hands them over to `to`."""

    verb: str
    who: str
    things: tuple[str, ...] = ()
    room: str = ""
    to: str = ""

    def moves(self, who: str) -> bool:
        return self.verb == "move" and self.who == who

    def loads(self, who: str) -> bool:
        """Tell whether it changes what `who` carries."""
        return bool(self.things) and who in (self.who, self.to)


def sentence(act: Act, wording: str) -> str:
    """An act in the words of one of `WORDING`, with the space before it."""
    things = " and ".join(f"the {thing}" for thing in act.things)
    return " " + wording.format(who=act.who, things=things, room=act.room, to=act.to)


@dataclass(frozen=True)
class Question:
    """A question at the end of a story, its answer, and the words that might be the answer."""

    text: str
    answer: str
    choices: tuple[str, ...]


def ask(kind: str, answer: str, choices: Iterable[str], **words: str) -> Question:
    asked, begun = QUESTIONS[kind]
    return Question(f"\n\nQuestion: {asked}\nAnswer:{begun}".format(**words), answer, tuple(choices))


class Story:
    """A world, and what was done in it so far.

    Nobody is anywhere before their first move. A thing that nobody has touched may be found in any room.

    Args:
        people: in the story.
        things: they may carry.
        rooms: they may be in.
    """

    def __init__(self, people: list[str], things: list[str], rooms: list[str]) -> None:
        self.people, self.things, self.rooms = people, things, rooms
        self.acts: list[Act] = []
        self.been: dict[str, list[str]] = {name: [] for name in [*people, *things]}
        """Rooms in which each person and thing was, in order."""
        self.held: dict[str, list[str]] = {who: [] for who in people}
        self.named = dict.fromkeys(rooms, 0)
        """How often each room was entered."""

    def do(self, act: Act) -> None:
        self.acts.append(act)
        if act.verb == "move":
            self.named[act.room] += 1
            for name in (act.who, *self.held[act.who]):
                self.been[name].append(act.room)
            return
        if act.verb == "take":
            for thing in act.things:
                self.been[thing] = self.been[thing] or self.been[act.who][-1:]
        else:
            self.held[act.who] = [thing for thing in self.held[act.who] if thing not in act.things]
        if act.verb != "drop":
            self.held[act.to or act.who] += act.things

    def move(self, rng: random.Random, who: str) -> Act:
        """Make `who` enter another room, of those that were entered least often."""
        rooms = [room for room in self.rooms if room not in self.been[who][-1:]]
        least = min(self.named[room] for room in rooms)
        return Act("move", who, room=rng.choice([room for room in rooms if self.named[room] == least]))

    def gain(self, rng: random.Random, who: str, count: int, among: Container[str]) -> Act | None:
        """Make `who` take so many things of `among`, or be handed them, where that is possible."""
        if not self.been[who]:
            return None
        carried = {thing for things in self.held.values() for thing in things}
        sources = {who: [t for t in self.things if t not in carried and self.been[t][-1:] in ([], self.been[who][-1:])]}
        sources |= {other: self.held[other] for other in self._near(who)}
        sources = {source: [thing for thing in things if thing in among] for source, things in sources.items()}
        able = [source for source, things in sources.items() if len(things) >= count]
        if not able:
            return None
        source = rng.choice(able)
        things = tuple(rng.sample(sources[source], count))
        return Act("take", who, things) if source == who else Act("hand", source, things, to=who)

    def lose(self, rng: random.Random, who: str, count: int) -> Act | None:
        """Make `who` set down so many things, or hand them over, where that is possible."""
        if len(self.held[who]) < count:
            return None
        things, to = tuple(rng.sample(self.held[who], count)), rng.choice([who, *self._near(who)])
        return Act("drop", who, things) if to == who else Act("hand", who, things, to=to)

    def _near(self, who: str) -> list[str]:
        """People in the room of `who`."""
        return [other for other in self.people if other != who and self.been[other][-1:] == self.been[who][-1:] != []]

    def anything(self, rng: random.Random, allowed: Callable[[Act], bool]) -> Act | None:
        """Make anybody do anything that is possible and allowed, half of the time a move."""
        for _ in range(TRIES):
            who, count = rng.choice(self.people), rng.choice((1, 1, 1, 2))
            kind = rng.choice(("move", "move", "gain", "lose"))
            if kind == "move":
                act: Act | None = self.move(rng, who)
            else:
                act = self.gain(rng, who, count, self.things) if kind == "gain" else self.lose(rng, who, count)
            if act and allowed(act):
                return act
        return None


@dataclass(frozen=True)
class Plan:
    """A story's course.

    Args:
        due: by number, the acts that it must have. They return None where they are not possible.
        allows: tells whether the act of that number may be another one.
        ask: makes the question, at the end. It returns None where there is none.
    """

    due: Mapping[int, Callable[[], Act | None]]
    allows: Callable[[int, Act], bool]
    ask: Callable[[], Question | None]


def undisturbed(who: str, stays: range, thing: str, lies: range) -> Callable[[int, Act], bool]:
    """Allow all but moves of `who` while the number is in `stays`, and acts on `thing` while it is in `lies`."""
    return lambda i, act: not (i in stays and act.moves(who)) and not (i in lies and thing in act.things)


def one(rng: random.Random, story: Story, facts: int, answer: str) -> Plan:
    """Where a person is: by the person's last move."""
    who, last = rng.choice(story.people), rng.randrange(facts)
    return Plan(
        due={last: partial(story.move, rng, who)},
        allows=lambda i, act: not (i > last and act.moves(who)),
        ask=lambda: ask("one", story.been[who][-1], story.rooms, who=who),
    )


def yes_no(rng: random.Random, story: Story, facts: int, answer: str) -> Plan:
    """Whether a person is in a room, that or the one before: by the last move."""
    who, last = rng.choice(story.people), rng.randrange(1, facts)
    move = partial(story.move, rng, who)
    return Plan(
        due={rng.randrange(last): move, last: move},
        allows=lambda i, act: not (i > last and act.moves(who)),
        ask=lambda: ask("yes_no", answer, YES_NO, who=who, room=story.been[who][-1 if answer == "yes" else -2]),
    )


def two(rng: random.Random, story: Story, facts: int, answer: str) -> Plan:
    """Where a thing is: by who got it, and then moved, or had moved before; or by who moved and then set it down."""
    who, thing = rng.choice(story.people), rng.choice(story.things)
    slots = sorted(rng.sample(range(facts), 3))
    course = rng.choice((("get", "move"), ("move", "get"), ("get", "move", "drop")))
    number = dict(zip(course, slots if len(course) == 3 else sorted(rng.sample(slots, 2)), strict=True))
    got, moved, dropped = number["get"], number["move"], number.get("drop", facts)
    acts: dict[str, Callable[[], Act | None]] = {
        "get": partial(story.gain, rng, who, 1, [thing]),
        "move": partial(story.move, rng, who),
        "drop": lambda: Act("drop", who, (thing,)),
    }
    untouched = range(0 if rng.random() < 0.5 else got, facts)
    return Plan(
        due={i: acts[verb] for verb, i in number.items()},
        allows=undisturbed(who, range(moved, dropped), thing, untouched),
        ask=lambda: ask("two", story.been[thing][-1], story.rooms, thing=thing),
    )


def three(rng: random.Random, story: Story, facts: int, answer: str) -> Plan:
    """Where a thing was before: by who had it, and the last two moves of that person."""
    who, thing = rng.choice(story.people), rng.choice(story.things)
    *earlier, moved = sorted(rng.sample(range(facts), 3))
    got, came = rng.sample(earlier, 2)
    move = partial(story.move, rng, who)
    untouched = range(0 if rng.random() < 0.5 else got, moved)

    def question() -> Question | None:
        been, room = story.been[thing], story.acts[moved].room
        if been.count(room) > 1:
            return None
        choices = [other for other in story.rooms if other != room]
        return ask("three", been[been.index(room) - 1], choices, thing=thing, room=room)

    return Plan(
        due={got: partial(story.gain, rng, who, 1, [thing]), came: move, moved: move},
        allows=undisturbed(who, range(came, moved), thing, untouched),
        ask=question,
    )


def _changes(total: int) -> list[tuple[int, ...]]:
    """Gains and losses of one or two things, four in all, that leave so many."""
    steps = product((1, 2, -1, -2), repeat=4)
    loads = {changes: list(accumulate(changes)) for changes in steps}
    possible = {changes: load for changes, load in loads.items() if min(load) >= 0 and max(load) < len(NUMBERS)}
    return [changes for changes, load in possible.items() if load[-1] == total]


CHANGES = [_changes(total) for total in range(len(NUMBERS))]


def counting(rng: random.Random, story: Story, facts: int, answer: str) -> Plan:
    """How many things a person carries: by the four times that the person got some or gave some away."""
    who, changes = rng.choice(story.people), rng.choice(CHANGES[NUMBERS.index(answer)])
    slots = sorted(rng.sample(range(facts), len(changes)))
    return Plan(
        due={
            i: partial(story.gain, rng, who, n, story.things) if n > 0 else partial(story.lose, rng, who, -n)
            for i, n in zip(slots, changes, strict=True)
        },
        allows=lambda i, act: not act.loads(who),
        ask=lambda: ask("counting", answer, NUMBERS, who=who),
    )


PLANS = {"one": one, "two": two, "three": three, "yes_no": yes_no, "counting": counting}
SUPPORTS = {"one": 1, "two": 2, "three": 3, "yes_no": 1, "counting": 4}
"""Facts that an answer takes, by kind of question."""


def tell(rng: random.Random, kind: str, make: Callable[[], Story], facts: int) -> tuple[Story, Question]:
    """A story of so many facts, and a question of that kind.

    Each answer comes as often as the others. Yes, no and numbers are drawn before the story is. A room that is entered
    more often than others is that much more often an answer, so a share of such stories is not told.
    """
    answer = rng.choice(NUMBERS if kind == "counting" else YES_NO)
    while True:
        story = make()
        question = _happens(rng, story, PLANS[kind](rng, story, facts, answer), facts)
        if question and rng.random() < _share(story, question):
            return story, question


def _happens(rng: random.Random, story: Story, plan: Plan, facts: int) -> Question | None:
    """Do all that is done, and make the question; `None` where the plan does not work out."""
    for i in range(facts):
        act = plan.due[i]() if i in plan.due else story.anything(rng, partial(plan.allows, i))
        if act is None:
            return None
        story.do(act)
    return plan.ask()


def _share(story: Story, question: Question) -> float:
    """Share to keep of such stories, so that a room's being entered often says nothing about its being the answer."""
    times = [story.named[room] for room in question.choices if story.named.get(room)]
    return min(times) / story.named[question.answer] if times else 1.0
