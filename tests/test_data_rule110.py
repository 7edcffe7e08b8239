"""Rule 110 against brute-force rollouts, and every answer derived again from the row's tokens."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sleep.data import Rule110
from hf_sleep.data.rule110 import QUERY, density, evolve

GOLDENS = np.load(Path(__file__).parent / "goldens" / "tasks" / "rule110.npz")
BOUNDARIES = {"periodic": "ring", "zero": "zero"}
TABLE = dict(zip([(a, b, c) for a in (1, 0) for b in (1, 0) for c in (1, 0)], (0, 1, 1, 0, 1, 1, 1, 0), strict=True))
COMMON = settings(max_examples=50, deadline=None, derandomize=True, database=None)
TASKS = st.builds(
    Rule110,
    width=st.integers(4, 40),
    steps=st.integers(1, 12),
    num_strings=st.integers(1, 3),
    boundary=st.sampled_from(["ring", "zero"]),
)


def naive(bits, steps, boundary):
    for _ in range(steps):
        edge = [0, *bits, 0] if boundary == "zero" else [bits[-1], *bits, bits[0]]
        bits = [TABLE[tuple(edge[i : i + 3])] for i in range(len(bits))]
    return bits


@pytest.mark.parametrize("width", [8, 16, 32, 64])
@pytest.mark.parametrize("name", BOUNDARIES)
def test_rollouts(name, width):
    start, expected = GOLDENS[f"init_w{width}"], GOLDENS[f"{name}_w{width}"]
    for t in range(33):
        np.testing.assert_array_equal(evolve(start.T, t, BOUNDARIES[name]).T, expected[:, t])


@pytest.mark.parametrize(("width", "steps"), [(6, 1), (8, 16)])
@pytest.mark.parametrize("name", BOUNDARIES)
def test_every_string_of_a_small_width(name, width, steps):
    expected = GOLDENS[f"all_w{width}_t{steps}_{name}"]
    states = np.arange(2**width)[None] >> np.arange(width)[::-1, None] & 1
    np.testing.assert_array_equal(evolve(states, steps, BOUNDARIES[name]).T, expected)
    assert density(width, steps, BOUNDARIES[name]) == expected[:, 0].mean()


@given(task=TASKS, seed=st.integers(0, 10**6), split=st.sampled_from(["train", "test"]))
@COMMON
def test_answers_follow_from_the_tokens(task, seed, split):
    row = task.example(seed, split)
    size = task.num_strings * task.width
    context, query, given_answers = row["input_ids"][:size], row["input_ids"][size], row["input_ids"][size + 1 :]
    strings = [context[i : i + task.width] for i in range(0, size, task.width)]
    assert query == QUERY
    assert set(context) <= {0, 1}
    assert given_answers == row["answer"] == [naive(s, task.steps, task.boundary)[0] for s in strings]
    assert row["labels"] == [-100] * (size + 1) + row["answer"]
    assert len(row["input_ids"]) == task.length


def test_the_papers_setting():
    task = Rule110.paper()
    assert (task.window_size, task.length, task.vocab_size, task.difficulties) == (24, 96 + 1 + 4, 3, (32,))
    assert Rule110.paper(8).steps == 8


def test_chance_is_what_the_commoner_bit_scores():
    task = Rule110.paper()
    assert task.chance(32) == pytest.approx(0.100, abs=0.001)
    rows = [row for i in range(0, 20_000, 2_000) for row in task.rows(0, "test", range(i, i + 2_000))]
    majority = [round(density(24, 32))] * task.length
    right = [ok for row in rows for _, ok in task.score(majority, row)]
    assert len(right) == 20_000
    assert np.mean(right) == pytest.approx(task.chance(32), abs=4 * (0.1 * 0.9 / 20_000) ** 0.5)


def test_density_counts_every_string_that_matters():
    """Exact up to 16 bits, sampled above; beyond 2t + 1 bits nothing reaches the first one."""
    firsts = [naive([s >> i & 1 for i in range(9)], 6, "ring")[0] for s in range(2**9)]
    assert density(9, 6) == np.mean(firsts)
    exact = evolve(np.arange(2**17) >> np.arange(17)[:, None] & 1, 8)[0].mean()
    assert density(17, 8) == pytest.approx(exact, abs=0.002)
    assert density(40, 8) == density(17, 8)


def test_depths_share_their_strings():
    shallow, deep = Rule110.paper(4).rows(0, "test", range(5)), Rule110.paper(16).rows(0, "test", range(5))
    assert [row["input_ids"][:97] for row in shallow] == [row["input_ids"][:97] for row in deep]
    assert [row["answer"] for row in shallow] != [row["answer"] for row in deep]


def test_a_zero_boundary_gives_the_answer_away():
    assert Rule110(width=64, steps=32, boundary="zero").chance(32) > 0.95 > 0.2 > Rule110(width=64, steps=32).chance(32)


def test_depth_is_claimed_where_the_ring_outgrows_the_light_cone():
    assert [t for t in (4, 8, 10, 12, 14, 16, 32) if Rule110.paper(t).claims_depth] == [4, 8, 10]
    assert Rule110(width=66, steps=32).claims_depth
    assert not Rule110(width=65, steps=32).claims_depth


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 2}, r"Rule110\.width=2 .*at least 3"),
        ({"width": 4}, r"Rule110\.width=4 .*at least 5"),
        ({"steps": 0}, r"Rule110\.steps=0 .*at least 1"),
        ({"num_strings": True}, r"Rule110\.num_strings=True .*integer"),
        ({"boundary": "torus"}, r"Rule110\.boundary='torus' .*'ring', 'zero'"),
    ],
)
def test_errors_name_field_value_and_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        Rule110(**fields)
