"""Depo against the official generator's sequences, and every answer derived again from the row's tokens."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sleep.data import Depo

GOLDENS = [
    json.loads(line)
    for line in (Path(__file__).parent / "goldens" / "tasks" / "depo.jsonl").read_text(encoding="utf-8").splitlines()
]
COMMON = settings(max_examples=50, deadline=None, derandomize=True, database=None)


def split_names(tokens, mini_vocab):
    names, name = [], []
    for token in tokens:
        assert 1 <= token <= 2 * mini_vocab
        name.append(token)
        if token > mini_vocab:
            names.append(tuple(name))
            name = []
    assert not name
    return names


def solve(task, row):
    """The cycle as a dictionary, and (k, start, expected answer) of each query, from the attended tokens alone."""
    tokens = [t for t, m in zip(row["input_ids"], row["attention_mask"], strict=True) if m]
    first = next(i for i, t in enumerate(tokens) if 9000 < t < 9500)
    context = tokens[:first]
    context = context[1:] if context[0] == 9999 else [t for t in context if t]
    names = split_names([t for t in context if t != 9700], task.mini_vocab)
    successor = dict(zip(names[::2], names[1::2], strict=True))
    queries, rest = [], tokens[first:]
    while rest:
        k, mark = rest[0] - 9000, rest.index(9500)
        (start,) = split_names(rest[1:mark], task.mini_vocab)
        answer = start
        for _ in range(k):
            answer = successor[answer]
        assert tuple(rest[mark + 1 : mark + 1 + len(answer)]) == answer
        rest = rest[mark + 1 + len(answer) :]
        queries.append((k, start, answer))
    return successor, queries


@st.composite
def tasks(draw):
    min_tlen = draw(st.integers(1, 3))
    pad = draw(st.booleans())
    return Depo(
        max_nodes=draw(st.integers(3, 12)),
        max_hops=draw(st.integers(1, 20)),
        num_queries=draw(st.integers(1, 6)),
        mini_vocab=draw(st.integers(12, 20)),
        min_tlen=min_tlen,
        max_tlen=min_tlen + draw(st.integers(0, 2)),
        separator=draw(st.booleans()),
        window_size=72 + draw(st.integers(0, 20)),
        pad_context=pad,
        official=not pad and draw(st.booleans()),
    )


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda g: f"{g['config']} {g['seed']}")
def test_official_sequences(golden):
    p = golden["params"]
    shape = {key: p[key] for key in ("mini_vocab", "min_tlen", "max_tlen", "separator")}
    task = Depo(p["N"], p["K"], p["M"], **shape, pad_context=False, official=True)
    row = task.example(golden["seed"], "test" if p["QA"] else "train")
    assert row["input_ids"] == golden["tokens"]
    assert row["num_nodes"] == golden["n"]
    assert row["hops"] == [q["k"] for q in golden["queries"]]
    assert row["answer"] == [q["answer"] for q in golden["queries"]]
    # The official mask of what to learn has the answer mark too.
    learned = [token == 9500 or label != -100 for token, label in zip(row["input_ids"], row["labels"], strict=True)]
    assert learned == [bool(x) for x in golden["label"]]
    assert [q[::2] for q in solve(task, row)[1]] == [(q["k"], tuple(q["answer"])) for q in golden["queries"]]


@given(task=tasks(), seed=st.integers(0, 10**6), split=st.sampled_from(["train", "test"]))
@COMMON
def test_answers_follow_from_the_tokens(task, seed, split):
    row = task.example(seed, split)
    successor, queries = solve(task, row)
    start = name = next(iter(successor))
    for steps in range(1, len(successor) + 1):
        name = successor[name]
        assert (name == start) == (steps == len(successor))
    assert row["num_nodes"] == len(successor)
    assert len({start for _, start, _ in queries}) == len(queries) == min(task.num_queries, len(successor))
    assert row["hops"] == [k for k, _, _ in queries]
    assert row["difficulty"] == max(row["hops"])
    assert [tuple(answer) for answer in row["answer"]] == [answer for _, _, answer in queries]
    labelled = [i for i, label in enumerate(row["labels"]) if label != -100]
    assert [row["labels"][i] for i in labelled] == [t for answer in row["answer"] for t in answer]
    assert all(row["labels"][i] == row["input_ids"][i] for i in labelled)
    assert all(row["input_ids"][i - 1] == 9500 or i - 1 in labelled for i in labelled)
    assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"]) <= task.length
    if split == "test":
        assert row["num_nodes"] == task.max_nodes
        assert set(row["hops"]) <= set(task.difficulties)
    if task.pad_context:
        assert len(row["input_ids"]) == task.length
        assert task.context_length % task.window_size == 0
        assert 9000 < row["input_ids"][task.context_length] < 9500
        assert task.context_length < min(labelled)
        fills = row["input_ids"][: task.context_length].count(0)
        assert row["input_ids"][:fills] == [0] * fills
        assert sum(row["attention_mask"]) <= task.context_length + task.window_size
        assert row["attention_mask"] == sorted(row["attention_mask"], reverse=True)
    else:
        assert row["attention_mask"] == [1] * len(row["input_ids"])


def test_presets():
    paper = Depo.paper()
    assert (paper.context_length, paper.length, paper.window_size) == (300, 360, 75)
    assert (paper.max_nodes, paper.max_hops, paper.num_queries) == (75, 16, 10)
    assert paper.difficulties == (1, 2, 4, 8, 16)
    assert Depo(max_hops=12).difficulties == (1, 2, 4, 8, 12)
    assert Depo.depo1().context_length == 900
    for n in (75, 100, 125):
        assert Depo.depo2(n).context_length == n * 14
    assert Depo.depo2(pad_context=False).mini_vocab == 3


def test_training_draws_n_and_k_as_specified():
    task = Depo(max_nodes=9, max_hops=5)
    rows = task.rows(0, "train", range(6_000))
    weights = {n: 1 / (n + 3) for n in range(3, 10)}
    counts = Counter(row["num_nodes"] for row in rows)
    assert counts.keys() == weights.keys()
    for n, weight in weights.items():
        assert counts[n] / len(rows) == pytest.approx(weight / sum(weights.values()), abs=0.02)
    hops = Counter(k for row in rows for k in row["hops"])
    assert hops.keys() == {1, 2, 3, 4, 5}
    assert all(hops[k] / hops.total() == pytest.approx(0.2, abs=0.02) for k in hops)


def test_chance_is_what_a_guess_among_the_names_scores():
    task = Depo(max_nodes=6, max_hops=8)
    guesser, right = random.Random(0), Counter()
    asked = Counter()
    for row in task.rows(0, "test", range(2_000)):
        successor, queries = solve(task, row)
        for k, start, answer in queries:
            asked[k] += 1
            right[k] += answer == guesser.choice([name for name in successor if name != start])
    assert asked.keys() == {1, 2, 4, 8}
    for k in asked:
        assert task.chance(k) == 1 / 5
        assert right[k] / asked[k] == pytest.approx(task.chance(k), abs=0.03)
    assert Depo(max_nodes=6, max_hops=6).chance(6) == 1.0


def test_depth_is_claimed_where_the_cycle_outlasts_the_hops():
    assert Depo(max_nodes=17, max_hops=16).claims_depth
    assert not Depo(max_nodes=16, max_hops=16).claims_depth


def test_every_query_is_scored_by_its_own_k():
    task = Depo(max_nodes=8, max_hops=8)
    row = task.example(3, "test")
    perfect = [*row["input_ids"][1:], 0]
    assert task.score(perfect, row) == [(k, True) for k in row["hops"]]
    mark = [i for i, token in enumerate(row["input_ids"]) if token == 9500][2]
    perfect[mark] += 1
    assert [ok for _, ok in task.score(perfect, row)] == [i != 2 for i in range(8)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_nodes": 2}, r"Depo\.max_nodes=2 .*at least 3"),
        ({"max_nodes": 60, "max_tlen": 1}, r"Depo\.max_nodes=60 .*50 distinct"),
        ({"max_hops": 500}, r"Depo\.max_hops=500 .*from 1 to 499"),
        ({"mini_vocab": 4501}, r"Depo\.mini_vocab=4501 .*to 4500"),
        ({"max_tlen": 1, "min_tlen": 2}, r"Depo\.max_tlen=1 .*at least 2"),
        ({"window_size": 59}, r"Depo\.window_size=59 .*at least 60"),
        ({"separator": 2}, r"Depo\.separator=2 .*True or False"),
        ({"official": True}, r"Depo\.official=True .*pad_context=False"),
    ],
)
def test_errors_name_field_value_and_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        Depo(**fields)
