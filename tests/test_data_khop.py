"""k-hop: every answer derived again from the row's tokens; and what holds for rows of every task."""

import hashlib
import itertools
import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sleep.data import Depo, KHop, KHopText, Rule110
from hf_sleep.data.khop import is_held_out

COMMON = settings(max_examples=50, deadline=None, derandomize=True, database=None)
# With the SHA-256 of rows 0 to 99 of seed 7 as JSON, in training and in test: seeded rows never change.
TASKS = {
    "rule110": (Rule110.paper(), "a0bfad2752acc8d5", "6225b6caeb4e1426"),
    "depo": (Depo.paper(), "fcfbf67257a50908", "f78e553b379f6f71"),
    "khop": (KHop(), "14c796bc8a41e70d", "07a665a088cc5e7a"),
    "khop_text": (KHopText(), "86056760396fc6c3", "a41b088a260cc3ca"),
    "khop_windows": (KHop(16, (3, 5), num_queries=6, windows=3), "d33e04a5aa6fb259", "a1570e1385f18224"),
}
ALL = pytest.mark.parametrize("task", [task for task, *_ in TASKS.values()], ids=list(TASKS))


@st.composite
def khops(draw):
    n = draw(st.integers(5, 12))
    return KHop(
        num_nodes=n,
        hops=tuple(sorted(draw(st.sets(st.integers(1, n - 1), min_size=1)))),
        num_queries=draw(st.one_of(st.none(), st.integers(1, n))),
        windows=draw(st.integers(1, n)),
        cycles=draw(st.integers(1, 3)),
    )


def solve(task, row):
    """The successors, the hop count and the nodes asked about, of the cycle asked about, from the tokens alone."""
    n, ids = task.num_nodes, row["input_ids"]
    nodes = task.cycles * n * n
    width = task.windows * task.window_size
    start = task.cycles * width
    hop = task.hops[ids[start] - nodes - task.cycles * n]
    assert ids[-1] == task.vocab_size - 1
    (about,) = {(token - nodes) // n for token in ids[start + 1 : -1]}
    cycles = []
    for number in range(task.cycles):
        part = [token for token in ids[number * width : (number + 1) * width] if token != task.vocab_size - 1]
        assert {token // n**2 for token in part} == {number}
        cycles.append({token // n % n: token % n for token in part})
        assert len(part) == len(cycles[-1]) == n
    return cycles[about], hop, [(token - nodes) % n for token in ids[start + 1 : -1]]


@given(task=khops(), seed=st.integers(0, 10**6), split=st.sampled_from(["train", "test"]))
@COMMON
def test_answers_follow_from_the_tokens(task, seed, split):
    row = task.example(seed, split)
    successor, hop, asked = solve(task, row)
    u = 0
    for steps in range(1, task.num_nodes + 1):
        u = successor[u]
        assert (u == 0) == (steps == task.num_nodes)
    assert len(set(asked)) == len(asked) == (task.num_queries or task.num_nodes)
    expected = []
    for u in asked:
        for _ in range(hop):
            u = successor[u]
        expected.append(u)
    assert row["difficulty"] == hop
    assert row["answer"] == expected
    first = task.cycles * task.windows * task.window_size + 2
    own = row["input_ids"][-2] // task.num_nodes * task.num_nodes
    assert own // task.num_nodes in range(task.cycles * task.num_nodes, task.cycles * (task.num_nodes + 1))
    assert row["labels"] == [-100] * first + [own + v for v in expected]
    assert len(row["input_ids"]) == len(row["labels"]) == task.length
    assert is_held_out([successor[u] for u in range(task.num_nodes)]) == (split == "test")


def questions(task, row):
    """The successors, and k, node and answer of every question, from the tokens of text-like facts alone."""
    n, names, ids = task.num_nodes, task.num_names or task.num_nodes, row["input_ids"]
    facts, asked = ids[: 4 * n], ids[4 * n : -1]
    assert facts[1::4] == [names] * n
    assert facts[3::4] == [names + 1] * n
    assert ids[-1] == task.vocab_size - 1 == 2 * names + 1
    successor = dict(zip(facts[::4], facts[2::4], strict=True))
    said = []
    for token, u in zip(asked[::2], asked[1::2], strict=True):
        v = u
        for _ in range(token - names - 1):
            v = successor[v]
        said.append((token - names - 1, u, v))
    return successor, said


@given(
    n=st.integers(5, 10),
    hops=st.sampled_from([(1,), (1, 2, 3, 4), (2, 4)]),
    count=st.one_of(st.none(), st.integers(1, 9)),
    more=st.one_of(st.none(), st.integers(0, 3)),
    seed=st.integers(0, 10**6),
    split=st.sampled_from(["train", "test"]),
)
@COMMON
def test_answers_follow_from_the_facts(n, hops, count, more, seed, split):
    task = KHopText(n, hops, count, None if more is None else n + more)
    row = task.example(seed, split)
    successor, said = questions(task, row)
    names = sorted(successor)
    assert names == sorted(successor.values())
    assert len(names) == n
    assert set(names) <= set(range(task.num_names or n))
    assert is_held_out([names.index(successor[u]) for u in names]) == (split == "test")
    assert len(said) == (count or 2 * n - 1)
    assert row["answer"] == [v for _, _, v in said]
    assert row["difficulty"] == max(k for k, _, _ in said)
    labelled = [i for i, label in enumerate(row["labels"]) if label != -100]
    assert [row["labels"][i] for i in labelled] == row["answer"]
    assert [row["input_ids"][i - 1] for i in labelled] == [u for _, u, _ in said]
    assert task.answers(row) == [(k, [i]) for i, (k, _, _) in zip(labelled, said, strict=True)]
    assert {k for k, _, _ in said} <= set(task.difficulties) == set(hops)
    assert len(row["input_ids"]) == len(row["labels"]) == task.length <= 2 * task.window_size


def test_text_never_says_an_answer():
    """After the facts there are hop counts and the nodes that are asked for, drawn alike."""
    task = KHopText(6, hops=(2,))
    pairs = Counter((u, v) for row in task.rows(0, "train", range(500)) for _, u, v in questions(task, row)[1])
    assert len(pairs) == 30
    assert max(pairs.values()) < 2 * min(pairs.values())
    assert task.chance(2) == 1 / 5
    assert {token for row in task.rows(0, "train", range(50)) for token in row["input_ids"][24:]} == {*range(6), 9, 13}


def test_short_cycles_of_many_names_speak_as_long_ones():
    short, long = KHopText(5, num_names=8), KHopText(8)
    assert short.vocab_size == long.vocab_size == 18
    assert (short.hop_token, short.window_size, long.window_size) == (long.hop_token, 20, 32)
    names = Counter(u for row in short.rows(0, "train", range(300)) for u in questions(short, row)[0])
    assert len(names) == 8
    assert max(names.values()) < 1.3 * min(names.values())


def test_cycles_come_one_after_another_and_are_asked_about_alike():
    task = KHop(6, hops=(1, 2), cycles=3)
    assert (task.vocab_size, task.window_size, task.length) == (3 * 36 + 18 + 2 + 1, 8, 32)
    rows = task.rows(0, "train", range(3_000))
    counts = Counter((row["input_ids"][-2] - 108) // 6 for row in rows)
    assert all(counts[cycle] / 3_000 == pytest.approx(1 / 3, abs=0.04) for cycle in range(3))


def test_edges_are_spread_evenly_over_the_windows():
    task = KHop(16, windows=3, num_queries=2)
    assert task.window_size == 6
    ids = task.example(0)["input_ids"]
    assert [sum(t < 256 for t in ids[w : w + 6]) for w in (0, 6, 12)] == [5, 5, 6]
    assert (KHop(8).window_size, KHop(8, num_queries=6).window_size) == (10, 8)


@pytest.mark.parametrize("n", [5, 6, 7])
def test_an_eighth_of_the_cycles_is_held_out(n):
    held = total = 0
    for rest in itertools.permutations(range(1, n)):
        order = (0, *rest)
        successor = [order[(order.index(u) + 1) % n] for u in range(n)]
        held += is_held_out(successor)
        total += 1
    assert 0 < held < total
    if n == 7:
        assert held / total == pytest.approx(1 / 8, abs=0.04)


def test_train_and_test_share_no_cycle():
    task = KHop(6)
    seen = {
        split: {tuple(sorted(solve(task, row)[0].items())) for row in task.rows(1, split, range(500))}
        for split in ("train", "test")
    }
    assert len(seen["train"]) > 50 < 50 + len(seen["test"])
    assert not seen["train"] & seen["test"]


def test_hops_are_drawn_alike():
    counts = Counter(row["difficulty"] for row in KHop().rows(0, "train", range(4_000)))
    assert counts.keys() == {1, 2, 3, 4}
    assert all(count / 4_000 == pytest.approx(0.25, abs=0.03) for count in counts.values())


def test_chance_is_what_a_guess_among_the_nodes_scores():
    task, guesser = KHop(), random.Random(0)
    right, asked = Counter(), Counter()
    for row in task.rows(0, "test", range(1_000)):
        guesses = [0] * task.length
        for i, label in enumerate(row["labels"]):
            if label != -100:
                own = row["input_ids"][i - 1]
                guesses[i - 1] = guesser.choice([token for token in range(64, 72) if token != own])
        for k, ok in task.score(guesses, row):
            asked[k] += 1
            right[k] += ok
    assert asked.keys() == set(task.difficulties)
    for k in asked:
        assert task.chance(k) == 1 / 7
        assert right[k] / asked[k] == pytest.approx(1 / 7, abs=0.04)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_nodes": 4}, r"KHop\.num_nodes=4 .*at least 5"),
        ({"hops": (1, 8)}, r"KHop\.hops=\(1, 8\) .*from 1 to 7"),
        ({"hops": (2, 1)}, r"KHop\.hops=\(2, 1\) .*ascending"),
        ({"hops": ()}, r"KHop\.hops=\(\) .*tuple"),
        ({"hops": 3}, r"KHop\.hops=3 .*tuple"),
        ({"hops": ("1",)}, r"KHop\.hops=\('1',\) .*integers"),
        ({"num_queries": 9}, r"KHop\.num_queries=9 .*from 1 to 8"),
        ({"windows": 0}, r"KHop\.windows=0 .*from 1 to 8"),
    ],
)
def test_errors_name_field_value_and_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        KHop(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_nodes": 4}, r"KHopText\.num_nodes=4 .*at least 5"),
        ({"hops": (1, 8)}, r"KHopText\.hops=\(1, 8\) .*from 1 to 7"),
        ({"num_names": 7}, r"KHopText\.num_names=7 .*at least 8"),
        ({"num_questions": 16}, r"KHopText\.num_questions=16 .*from 1 to 15"),
    ],
)
def test_errors_of_the_text_name_field_value_and_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        KHopText(**fields)


@pytest.mark.parametrize("name", TASKS)
def test_rows_never_change(name):
    task, *expected = TASKS[name]
    rows = [task.rows(7, split, range(100)) for split in ("train", "test")]
    assert [hashlib.sha256(json.dumps(r).encode()).hexdigest()[:16] for r in rows] == expected


@ALL
def test_all_that_is_predicted_stands_in_the_last_window(task):
    """And is predicted from there: the windows before it sleep, without labels."""
    for row in task.rows(0, "train", range(50)):
        real = sum(row.get("attention_mask", [1] * task.length))
        last = (real - 1) // task.window_size
        assert last > 0
        assert {(i - 1) // task.window_size for i, label in enumerate(row["labels"]) if label != -100} == {last}
        assert max(row["input_ids"] + row["labels"]) < task.vocab_size
        assert len(row["input_ids"]) == len(row["labels"]) == task.length


@ALL
@pytest.mark.parametrize("split", ["train", "test"])
def test_stream_and_dataset_are_the_same_rows(task, split):
    size = 300
    expected = task.rows(3, split, range(size))
    assert list(task.dataset(size, seed=3, split=split)) == expected
    assert list(task.stream(3, split).take(size)) == expected
    assert list(task.stream(3, split, start=120).take(10)) == expected[120:130]
    assert task.rows(3, split, range(7, 9)) == [task.rows(3, split, range(i, i + 1))[0] for i in (7, 8)]


@ALL
def test_seeds_and_splits_are_different_rows(task):
    draws = [task.rows(seed, split, range(20)) for seed in (0, 1) for split in ("train", "test")]
    assert all(a != b for a, b in itertools.combinations([row for rows in draws for row in rows], 2))


@ALL
def test_readers_share_the_rows(task, monkeypatch):
    """Two ranks of two data-loader workers, each past the end of a block."""
    monkeypatch.setattr("hf_sleep.data.task.BLOCK", 4)
    expected = task.rows(0, "train", range(40))
    got = [[] for _ in range(4)]
    for rank, worker in itertools.product(range(2), range(2)):
        stream = split_dataset_by_node(task.stream(shards=4), rank, 2)
        monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda w=worker: SimpleNamespace(id=w, num_workers=2))
        got[rank + 2 * worker] = list(itertools.islice(stream, 10))
    assert [row for step in zip(*got, strict=True) for row in step] == expected


@ALL
def test_a_stream_resumes_from_its_state(task):
    stream = task.stream(5)
    reader = iter(stream)
    for _ in range(17):
        next(reader)
    resumed = task.stream(5)
    resumed.load_state_dict(stream.state_dict())
    assert list(itertools.islice(resumed, 3)) == task.rows(5, "train", range(17, 20))


@ALL
def test_score_is_exact_match(task):
    row = task.rows(0, "test", range(1))[0]
    perfect = [*row["labels"][1:], 0]
    assert {ok for _, ok in task.score(perfect, row)} == {True}
    last = max(i for i, label in enumerate(row["labels"]) if label != -100)
    perfect[last - 1] += 1
    results = [ok for _, ok in task.score(perfect, row)]
    assert results == [True] * (len(results) - 1) + [False]


@ALL
def test_errors_of_the_source(task):
    name = type(task).__name__
    for call, message in [
        (lambda: task.example("7"), "seed='7' .*integer"),
        (lambda: task.example(7, "valid"), "split='valid' .*train.*test"),
        (lambda: task.dataset(0), "size=0 .*at least 1"),
        (lambda: task.dataset(3, split="dev"), "split='dev'"),
        (lambda: task.stream(seed=1.5), "seed=1.5 .*integer"),
        (lambda: task.stream(shards=0), "shards=0 .*at least 1"),
        (lambda: task.stream(start=-1), "start=-1 .*at least 0"),
        (lambda: task.score([1], task.example(0)), r"len\(predicted_ids\)=1 .*"),
    ]:
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            call()


@ALL
def test_a_generator_can_be_handed_in(task):
    rng = random.Random(5)
    assert task.example(rng) == task.example(5)
    assert task.example(rng) != task.example(5)
