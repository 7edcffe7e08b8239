"""MQAR: every value found again from the row's tokens, and every pair slept on before a key is asked."""

import hashlib
import json
import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sleep.data import MQAR

COMMON = settings(max_examples=50, deadline=None, derandomize=True, database=None)


@st.composite
def tasks(draw):
    pairs, window_size = draw(st.integers(1, 40)), draw(st.integers(2, 90))
    first_id = draw(st.integers(0, 2000))
    fewest = -(-pairs // (window_size // 2))
    return MQAR(
        pairs=pairs,
        queries=draw(st.one_of(st.none(), st.integers(1, min(pairs, window_size - 1)))),
        vocab_size=first_id + 1 + 2 * pairs + draw(st.integers(0, 50)),
        first_id=first_id,
        windows=draw(st.one_of(st.none(), st.integers(fewest, pairs))),
        window_size=window_size,
    )


def parts(row):
    """The tokens of each slept window, and those that ask."""
    ends = [i + 1 for i, sleeps in enumerate(row["sleep_after"]) if sleeps]
    return [row["input_ids"][a:b] for a, b in pairwise([0, *ends, len(row["input_ids"])])]


@given(task=tasks(), seed=st.integers(0, 10**6), split=st.sampled_from(["train", "test"]))
@COMMON
def test_values_follow_from_the_tokens(task, seed, split):
    row = task.example(seed, split)
    *windows, (*asked, end) = parts(row)
    told = [pair for window in windows for pair in zip(window[::2], window[1::2], strict=True)]
    value = dict(told)
    assert len(told) == len(value) == len(set(value.values())) == task.pairs == row["difficulty"]
    assert row["answer"] == [value[key] for key in asked]
    assert row["choices"] == sorted(value.values())
    assert len(set(asked)) == len(asked) == (task.queries or min(task.pairs, task.window_size - 1))
    start = len(row["input_ids"]) - len(asked)
    assert row["labels"] == [-100] * start + row["answer"]
    assert row["input_ids"][start - 1 : -1] == asked
    assert end == task.first_id < min(value) <= max(value) < min(value.values()) <= max(value.values())
    assert max(value.values()) < task.vocab_size
    assert len(row["input_ids"]) == len(row["sleep_after"]) == task.length
    sizes = [len(window) for window in windows]
    assert max(sizes) - min(sizes) <= 2
    assert max(*sizes, len(asked) + 1) <= task.window_size
    assert len(windows) == (task.windows or -(-task.pairs // (task.window_size // 2)))


def test_half_of_the_ids_are_keys_and_half_are_values():
    task = MQAR(pairs=2, vocab_size=17, first_id=5)
    seen = [set(), set()]
    for row in task.rows(0, "train", range(200)):
        seen[0] |= set(row["input_ids"][:4:2])
        seen[1] |= set(row["input_ids"][1:4:2])
    assert seen == [set(range(6, 11)), set(range(11, 16))]


def test_rows():
    task = MQAR(pairs=20, window_size=16, queries=5)
    rows = task.rows(3, "train", range(5))
    assert list(task.dataset(5, 3)) == list(task.stream(3).take(5)) == rows
    assert task.rows(3, "test", range(5)) != rows
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == "edb2890195c4bca7"
    assert (task.difficulties, task.length, len(parts(rows[0]))) == ((20,), 46, 4)
    perfect = [*rows[0]["labels"][1:], 0]
    assert task.score(perfect, rows[0]) == [(20, True)] * 5
    perfect[-3] += 1
    assert [right for _, right in task.score(perfect, rows[0])] == [True, True, True, False, True]


def test_keys_are_asked_in_any_order():
    task = MQAR(pairs=4, queries=2)
    order = Counter(
        tuple(row["input_ids"].index(key) // 2 for key in row["input_ids"][8:10])
        for row in task.rows(0, "train", range(1_200))
    )
    assert len(order) == 12
    assert all(60 < count < 150 for count in order.values())


@pytest.mark.parametrize("pairs", [4, 16])
def test_chance_is_what_a_guess_among_the_values_of_the_row_scores(pairs):
    task, guesser = MQAR(pairs=pairs), random.Random(0)
    right = asked = 0
    for row in task.rows(0, "test", range(6_000 // pairs)):
        guesses = [0] * task.length
        for i in range(2 * pairs, 3 * pairs):
            guesses[i] = guesser.choice(row["input_ids"][1 : 2 * pairs : 2])
        scores = task.score(guesses, row)
        asked += len(scores)
        right += sum(ok for _, ok in scores)
    assert task.chance(pairs) == 1 / pairs
    assert right / asked == pytest.approx(1 / pairs, abs=0.02)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pairs": 0}, "pairs=0 cannot work: it must be an integer of at least 1"),
        ({"window_size": 1}, "window_size=1 cannot work: it must be an integer of at least 2"),
        ({"first_id": -1}, "first_id=-1 cannot work: it must be an integer of at least 0"),
        ({"vocab_size": 1064}, "vocab_size=1064 cannot work: it must be an integer of at least 1065"),
        ({"queries": 33}, "queries=33 cannot work: it must be an integer from 1 to 32"),
        ({"queries": 16, "window_size": 16}, "queries=16 cannot work: it must be an integer from 1 to 15"),
        ({"windows": 3, "window_size": 16}, "windows=3 cannot work: it must be an integer from 4 to 32"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ValueError, match=rf"MQAR\.{message}"):
        MQAR(**fields)
