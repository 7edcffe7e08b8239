"""Facts: every answer, and what it takes, derived again from the row's text; all of it slept on before it is asked."""

import hashlib
import json
import random
import re
from collections import Counter
from itertools import pairwise

import pytest
from helpers import byte_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from hf_sleep.data import Facts
from hf_sleep.data.facts import DID, HAPPENED, KINDS, SCENES, WHEN
from hf_sleep.data.stories import NUMBERS, PEOPLE, ROOMS, THINGS, YES_NO

COMMON = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
SUPPORTING = {"one": 1, "yes_no": 1, "two": 2, "three": 3, "counting": 4}
ACTS = {
    "move": r"(\w+) (?:walked into|entered|came into) the (\w+)",
    "take": r"(\w+) (?:collected|took hold of|gathered up) the (\w+)(?: and the (\w+))?",
    "drop": r"(\w+) (?:set down|let go of|laid down) the (\w+)(?: and the (\w+))?",
    "hand": r"(\w+) (?:handed|entrusted) the (\w+)(?: and the (\w+))? (?:over )?to (\w+)",
}
ASKED = {
    "one": r"Where is (\w+) now\?\nAnswer: \w+ is in the",
    "two": r"Where is the (\w+) now\?\nAnswer: The \w+ is in the",
    "three": r"Where was the (\w+) before it was in the (\w+)\?\nAnswer: Before that, the \w+ was in the",
    "yes_no": r"Is (\w+) in the (\w+) now, yes or no\?\nAnswer:",
    "counting": r"How many things does (\w+) carry now: none, one, two, three or four\?\nAnswer:",
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def parts(row):
    """The tokens of each slept window, and those after them, without the answer."""
    assert len(row["sleep_after"]) == len(row["input_ids"]) == len(row["labels"])
    ends = [i + 1 for i, sleeps in enumerate(row["sleep_after"]) if sleeps]
    start = next(i for i, label in enumerate(row["labels"]) if label != -100)
    assert row["labels"][start:] == row["input_ids"][start:]
    return [row["input_ids"][a:b] for a, b in pairwise([0, *ends, start])]


def read(tokenizer, row):
    """The rooms, per window the acts `(verb, who, things, room, to)`, and the question's kind and words."""
    *windows, question = (tokenizer.decode(part) for part in parts(row))
    opening, rest = windows[0].split(".", 1)
    rooms = re.fullmatch(r"This is what happened in a house with the following rooms: ([\w, ]+)", opening)[1]
    told = []
    for text in [rest, *windows[1:]]:
        sentences = re.findall(r" ([^.]+)\.", text)
        assert "".join(f" {sentence}." for sentence in sentences) == text
        told.append([act for sentence in sentences if (act := parse(sentence))])
    asked = [(kind, *match.groups()) for kind, form in ASKED.items() if (match := re.fullmatch(form, question[12:]))]
    assert question[:12] == "\n\nQuestion: "
    assert len(asked) == 1
    return rooms.split(", "), told, asked[0]


def parse(sentence):
    for verb, form in ACTS.items():
        if match := re.fullmatch(form, sentence):
            who, *others = match.groups()
            if verb == "move":
                return verb, who, (), others[0], None
            things = tuple(thing for thing in others[:2] if thing)
            return verb, who, things, None, others[2] if verb == "hand" else None
    return None


def solve(acts, asked):
    """The answer as far as these acts tell, or `None`; what they leave out is unknown."""
    kind, about, *room = asked
    place, holder, been, load = {}, {}, [], 0
    for verb, who, things, to_room, to in acts:
        if verb == "move":
            place[who] = to_room
        load += len(things) * (((verb == "take" and who) == about or to == about) - (verb != "take" and who == about))
        if about in things:
            holder[about] = {"take": who, "hand": to}.get(verb)
        where = place.get(who if about in things and verb != "hand" else holder.get(about))
        if where and been[-1:] != [where]:
            been.append(where)
    if kind == "counting":
        return NUMBERS[load] if 0 <= load < len(NUMBERS) else None
    if kind == "one":
        return place.get(about)
    if kind == "yes_no":
        return None if about not in place else "yes" if place[about] == room[0] else "no"
    if kind == "two":
        return been[-1] if been else None
    return been[been.index(room[0]) - 1] if room[0] in been[1:] else None


def supports(acts, asked):
    """Numbers of the acts that tell the answer."""
    kind, about, *room = asked

    def last(before, tells):
        return max(i for i, act in enumerate(acts[:before]) if tells(act))

    def moves(who):
        return lambda act: act[0] == "move" and act[1] == who

    if kind in ("one", "yes_no"):
        return {last(None, moves(about))}
    if kind == "counting":
        return {i for i, (_, who, things, _, to) in enumerate(acts) if things and about in (who, to)}
    if kind == "two":
        got = last(None, lambda act: about in act[2])
        verb, who, _, _, to = acts[got]
        return {got, last(got if verb == "drop" else None, moves(to or who))}
    for i, (verb, who, _, where, _) in enumerate(acts):
        if verb == "move" and where == room[0]:
            touched = [j for j, act in enumerate(acts[:i]) if about in act[2]]
            if touched and acts[touched[-1]][0] != "drop" and who == (acts[touched[-1]][4] or acts[touched[-1]][1]):
                return {touched[-1], last(i, moves(who)), i}
    raise AssertionError(f"{about} never came to {room}")


def check_possible(acts):
    """Everybody is where they are said to act, and has what they give."""
    place, holder, lies = {}, {}, {}
    for verb, who, things, room, to in acts:
        if verb == "move":
            assert place.get(who) != room
            place[who] = room
        assert who in place
        for thing in things:
            if verb == "take":
                assert thing not in holder
                assert lies.pop(thing, place[who]) == place[who]
                holder[thing] = who
            else:
                assert holder.pop(thing) == who
                if verb == "drop":
                    lies[thing] = place[who]
                else:
                    assert who != to
                    assert place[who] == place[to]
                    holder[thing] = to


@given(
    kind=st.sampled_from(KINDS),
    facts=st.integers(8, 30),
    people=st.integers(2, 8),
    things=st.integers(4, 8),
    rooms=st.integers(3, 12),
    windows=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    split=st.sampled_from(["train", "test"]),
)
@COMMON
def test_answers_and_what_they_take_follow_from_the_text(
    tokenizer, kind, facts, people, things, rooms, windows, seed, split
):
    task = Facts(tokenizer, windows, 2100 // windows, (kind,), facts, people, things, rooms)
    row = task.example(seed, split)
    named, told, asked = read(tokenizer, row)
    acts = [act for window in told for act in window]
    check_possible(acts)
    assert len(told) == windows
    assert len(acts) == facts
    assert (asked[0], row["kind"], row["difficulty"]) == (kind, kind, SUPPORTING[kind])
    assert row["answer"] == row["references"] == [solve(acts, asked)]
    said = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(said) == f" {row['answer'][0]}{tokenizer.eos_token}"
    needed = supports(acts, asked)
    assert len(needed) == row["difficulty"]
    assert solve([acts[i] for i in sorted(needed)], asked) == row["answer"][0]
    for left_out in needed:
        assert solve([acts[i] for i in sorted(needed - {left_out})], asked) != row["answer"][0]
    assert len(set(named)) == len(named) == rooms
    assert {act[3] for act in acts if act[3]} <= set(named)
    assert len({name for act in acts for name in (act[1], act[4]) if name}) <= people
    assert len({thing for act in acts for thing in act[2]}) <= things
    words = {"yes_no": list(YES_NO), "counting": list(NUMBERS)}
    assert row["choices"] == words.get(kind, [room for room in named if room not in asked[2:]])


def test_all_is_slept_on_before_it_is_asked(tokenizer):
    task = Facts(tokenizer, windows=3, window_size=900)
    for row in task.rows(0, "train", range(20)):
        *windows, question = parts(row)
        assert len(windows) == 3
        assert all(task.window_size - 90 < len(window) <= task.window_size for window in windows)
        assert len(row["input_ids"]) - sum(map(len, windows)) <= task.window_size
        assert len(question) > 40
        assert len(row["input_ids"]) <= task.length


@pytest.mark.parametrize("kind", KINDS)
def test_facts_that_matter_are_in_any_window(tokenizer, kind):
    task = Facts(tokenizer, windows=4, window_size=500, kinds=(kind,), facts=16)
    spread = Counter()
    for row in task.rows(0, "train", range(400)):
        _, told, asked = read(tokenizer, row)
        window = [w for w, acts in enumerate(told) for _ in acts]
        spread.update(window[i] for i in supports([act for acts in told for act in acts], asked))
    share = [spread[w] / spread.total() for w in range(4)]
    assert min(share) > (0.18 if kind in ("one", "yes_no") else 0.12)
    assert max(share) < (0.32 if kind in ("one", "yes_no") else 0.36)


@pytest.mark.parametrize("kind", KINDS)
def test_chance_is_what_a_guess_scores(tokenizer, kind):
    """Whether it is any of the choices, the first, second, … or last of them, or what is named most often."""
    task, guesser = Facts(tokenizer, windows=1, window_size=720, kinds=(kind,), facts=10), random.Random(0)
    right = Counter()
    for row in task.rows(0, "test", range(1_000)):
        right[row["choices"].index(row["answer"][0])] += 1
        right["any"] += task.judge(guesser.choice(row["choices"]), row)
        _, told, _ = read(tokenizer, row)
        named = Counter(act[3] for acts in told for act in acts)
        right["often"] += task.judge(max(row["choices"], key=named.__getitem__), row)
    chance = task.chance(SUPPORTING[kind], kind)
    choices = {"one": 8, "two": 8, "three": 7, "yes_no": 2, "counting": 5}
    assert chance == task.chance(SUPPORTING[kind]) == 1 / choices[kind]
    assert len(right) == 2 + choices[kind]
    assert all(count / 1_000 == pytest.approx(chance, abs=0.04) for count in right.values())


def test_kinds_are_drawn_alike(tokenizer):
    task = Facts(tokenizer, windows=1, window_size=900, facts=8, rooms=5)
    counts = Counter(row["kind"] for row in task.rows(0, "train", range(500)))
    assert set(counts) == set(KINDS)
    assert all(70 < count < 130 for count in counts.values())
    assert task.difficulties == (1, 2, 3, 4)
    assert task.chance(1) == (1 / 5 + 1 / 2) / 2
    assert (task.chance(1, "one"), task.chance(1, "yes_no")) == (1 / 5, 1 / 2)
    few = Facts(tokenizer, windows=1, window_size=900, facts=8, kinds=("three", "one"))
    assert few.difficulties == (1, 3)
    assert {row["kind"] for row in few.rows(0, "train", range(40))} == {"three", "one"}


def test_yes_and_no_are_about_the_rooms_in_which_the_person_was_last(tokenizer):
    task = Facts(tokenizer, windows=2, window_size=700, kinds=("yes_no",), facts=12)
    for row in task.rows(0, "train", range(50)):
        _, told, (_, who, room) = read(tokenizer, row)
        been = [act[3] for acts in told for act in acts if act[:2] == ("move", who)]
        assert room == been[-1 if row["answer"] == ["yes"] else -2]


def test_filler_says_nothing_of_consequence(tokenizer):
    told = {*ROOMS, *THINGS, *NUMBERS, *YES_NO}
    for sentence in (*SCENES, *HAPPENED, *DID, *WHEN):
        assert not told & set(sentence.lower().split())
    row = Facts(tokenizer, windows=2, window_size=2000).example(0)
    text = tokenizer.decode([token for part in parts(row)[:2] for token in part])
    filler = [sentence for sentence in text.split(". ")[1:] if not parse(sentence.rstrip("."))]
    about_people = sum(sentence.split()[0] in PEOPLE for sentence in filler)
    assert len(filler) > 40
    assert 0.3 < about_people / len(filler) < 0.7


def test_a_tokenizer_with_a_beginning():
    tokenizer = byte_tokenizer()
    begin = [("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=begin
    )
    task = Facts(tokenizer, windows=2, window_size=900)
    for row in task.rows(0, "train", range(5)):
        assert [token for token in row["input_ids"] if token == begin[0][1]] == row["input_ids"][:1]
        row |= {key: row[key][1:] for key in ("input_ids", "labels", "sleep_after")}
        _, told, asked = read(tokenizer, row)
        assert solve([act for acts in told for act in acts], asked) == row["answer"][0]


def test_rows(tokenizer):
    task = Facts(tokenizer, windows=2, window_size=900)
    rows = task.rows(3, "train", range(5))
    assert list(task.dataset(5, 3)) == list(task.stream(3).take(5)) == rows
    assert task.rows(3, "test", range(5)) != rows
    text = [[tokenizer.decode(row["input_ids"]), row["kind"], row["answer"]] for row in rows]
    assert hashlib.sha256(json.dumps(text).encode()).hexdigest()[:16] == "4b2ff2bb9148742a"
    row = rows[0]
    perfect = [*row["labels"][1:], 0]
    assert task.score(perfect, row) == [(row["difficulty"], True)]
    perfect[-3] += 1
    assert task.score(perfect, row) == [(row["difficulty"], False)]
    assert task.vocab_size == len(tokenizer)


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (" cellar", 1),
        (" Cellar. Then Alma entered the attic.", 1),
        ("\n The cellar\nQuestion: Is she in the attic?", 1),
        (" lobby, where she was before the cellar", 1),
        (" attic", 0),
        (" attic or cellar", 0),
        (" cellars", 0),
        ("", 0),
        (" nowhere. The cellar", 0),
    ],
)
def test_an_answer_has_the_word_and_no_other(tokenizer, said, right):
    task = Facts(tokenizer, window_size=1000)
    assert task.judge(said, {"choices": ["attic", "cellar"], "references": ["cellar"]}) == right


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kinds": ()}, r"kinds=\(\) cannot work: it must be a tuple of some of \('one', 'two', 'three', 'yes_no'"),
        ({"kinds": ("one", "four")}, r"kinds=\('one', 'four'\)"),
        ({"kinds": ("one", "one")}, r"kinds=\('one', 'one'\)"),
        ({"kinds": "one"}, "kinds='one'"),
        ({"facts": 7}, "facts=7 cannot work: it must be an integer of at least 8"),
        ({"people": 1}, "people=1 cannot work: it must be an integer from 2 to"),
        ({"things": 3}, "things=3 cannot work: it must be an integer from 4 to"),
        ({"rooms": 13}, "rooms=13 cannot work: it must be an integer from 3 to 12"),
        ({"windows": 0}, "windows=0 cannot work: it must be an integer of at least 1"),
        ({"window_size": 300}, r"window_size=300 cannot work: it must be at least \d+, for the facts and the question"),
    ],
)
def test_mistakes_are_named(tokenizer, fields, message):
    with pytest.raises(ValueError, match=f"Facts.{message}"):
        Facts(**{"tokenizer": tokenizer, "window_size": 1000} | fields)


@pytest.mark.parametrize("windows", [1, 2, 50])
def test_the_least_window_that_works_does(tokenizer, windows):
    with pytest.raises(ValueError, match="it must be at least") as error:
        Facts(tokenizer, windows, window_size=1)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    with pytest.raises(ValueError, match=f"at least {least}"):
        Facts(tokenizer, windows, window_size=least - 1)
    rows = Facts(tokenizer, windows, window_size=least).rows(0, "train", range(20))
    assert all(len(window) <= least for row in rows for window in parts(row))


def test_chances_of_what_is_not_asked_are_refused(tokenizer):
    task = Facts(tokenizer, window_size=1000, kinds=("one", "two"))
    with pytest.raises(ValueError, match=r"difficulty=3 cannot work: it must be one of \(1, 2\)"):
        task.chance(3)
    with pytest.raises(ValueError, match=r"kind='two' cannot work: it must be one of \('one',\), or None"):
        task.chance(1, "two")
