"""Mamba2's operators against their naive form, and the laws that the rest of the package builds on."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import mamba2_chunk_scan

from hf_sleep.ops.mamba2 import chunk_mamba2, mamba2, naive_mamba2, step_mamba2

NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")
BY_TOKEN = (0, 1, 3, 4)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
FORMS = [naive_mamba2, chunk_mamba2, mamba2]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_inputs(batch, tokens, heads=4, groups=2, key_dim=5, value_dim=7, dtype=torch.float64):
    """x, dt, A, B, C, D, initial_state, all of them leaves that want gradients."""
    x = torch.randn(batch, tokens, heads, value_dim, dtype=dtype)
    dt, A = torch.rand(batch, tokens, heads, dtype=dtype), -torch.rand(heads, dtype=dtype)
    B, C = (torch.randn(batch, tokens, groups, key_dim, dtype=dtype) for _ in range(2))
    D, state = torch.randn(heads, dtype=dtype), torch.randn(batch, heads, key_dim, value_dim, dtype=dtype)
    return [z.requires_grad_() for z in (x, dt, A, B, C, D, state)]


def run(op, inputs, **kwargs):
    """The results of an operator, and the gradients of a loss that reads both of them unevenly."""
    results = op(*inputs, **kwargs)
    loss = sum((y.sin() * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in results)
    return [*results, *torch.autograd.grad(loss, inputs)]


def assert_same(actual, expected, tolerance):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale, msg=lambda m, i=i: f"result {i}: {m}")


def test_the_formula_by_hand():
    """One head, one channel, two tokens: numbers that can be checked with a pencil."""
    x, dt = torch.tensor([2.0, 3.0]).view(1, 2, 1, 1), torch.tensor([0.5, 1.0]).view(1, 2, 1)
    B, C = torch.tensor([1.0, 4.0]).view(1, 2, 1, 1), torch.tensor([10.0, 100.0]).view(1, 2, 1, 1)
    A, D = torch.tensor([-0.6931471805599453]), torch.tensor([7.0])  # halves per unit of time
    y, state = naive_mamba2(x.double(), dt.double(), A.double(), B.double(), C.double(), D.double())
    assert torch.allclose(y.flatten(), torch.tensor([10 * 1.0 + 14, 100 * 12.5 + 21]).double())
    assert state.item() == pytest.approx(12.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tokens", [1, 2, 3, 15, 33, 63, 64, 65, 130])
def test_chunk_equals_naive(tokens, dtype):
    inputs = make_inputs(2, tokens, dtype=dtype)
    expected = run(naive_mamba2, inputs)
    assert_same(run(chunk_mamba2, inputs), expected, TOLERANCE[dtype])
    assert_same(run(mamba2, inputs), expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 1), (4, 4), (6, 3)])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(1, 1), (8, 3), (128, 64)])
def test_chunk_equals_naive_at_other_widths(heads, groups, key_dim, value_dim):
    inputs = make_inputs(1, 70, heads, groups, key_dim, value_dim)
    assert_same(run(chunk_mamba2, inputs), run(naive_mamba2, inputs), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("lengths", [None, [1, 0, 1]])
def test_step_equals_naive(lengths, groups, dtype):
    inputs = make_inputs(3, 1, groups=groups, dtype=dtype)
    lengths = None if lengths is None else torch.tensor(lengths)
    expected = run(naive_mamba2, inputs, lengths=lengths)
    assert_same(run(step_mamba2, inputs, lengths=lengths), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("form", [*FORMS, step_mamba2])
def test_no_initial_state_is_zeros(form):
    *inputs, state = make_inputs(2, 1)
    assert_same(form(*inputs), form(*inputs, torch.zeros_like(state)), 0)


@pytest.mark.parametrize("tokens", [64, 100])
def test_equals_transformers(tokens):
    inputs = make_inputs(2, tokens, key_dim=16, value_dim=24, dtype=torch.float32)

    def theirs(x, dt, A, B, C, D, state):
        y, state = mamba2_chunk_scan(
            x, dt, A, B, C, chunk_size=32, D=D, initial_states=state.mT, return_final_states=True
        )
        return y, state.mT

    assert_same(run(mamba2, inputs), run(theirs, inputs), 1e-4)


@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_gradcheck(tokens):
    inputs = make_inputs(2, tokens, heads=2, groups=1, key_dim=2, value_dim=3)
    lengths = torch.tensor([tokens, tokens // 2])
    assert torch.autograd.gradcheck(lambda *z: mamba2(*z, lengths=lengths), inputs, fast_mode=True)


@settings(max_examples=25, deadline=None)
@given(pieces=st.lists(st.integers(1, 80), min_size=2, max_size=5))
def test_any_split_is_one_call(pieces):
    inputs = make_inputs(1, sum(pieces))

    def piecewise(x, dt, A, B, C, D, state):
        outputs = []
        for x_i, dt_i, B_i, C_i in zip(*(z.split(pieces, 1) for z in (x, dt, B, C)), strict=True):
            y, state = mamba2(x_i, dt_i, A, B_i, C_i, D, state)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    assert_same(run(piecewise, inputs), run(mamba2, inputs), 1e-10)


@pytest.mark.parametrize("poison", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("form", FORMS)
def test_pads_reach_nothing(form, poison):
    lengths = torch.tensor([0, 7, 65, 70])
    inputs = make_inputs(4, 70)
    with torch.no_grad():
        for i in BY_TOKEN:
            for row, length in enumerate(lengths):
                inputs[i][row, length:] = poison
    y, state, *grads = run(form, inputs, lengths=lengths)
    assert torch.equal(state[0], inputs[6][0])
    for row, length in enumerate(lengths.tolist()):
        assert not y[row, length:].any()
        for i in BY_TOKEN:
            assert not grads[i][row, length:].any()
        if length:
            alone = [z[row : row + 1, :length] if i in BY_TOKEN else z for i, z in enumerate(inputs[:6])]
            expected = naive_mamba2(*alone, inputs[6][row : row + 1])
            assert_same((y[row : row + 1, :length], state[row : row + 1]), expected, 1e-10)
    assert all(z.isfinite().all() for z in grads)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 40, 70])
def test_pads_leave_the_state_exactly_as_it_is(form, tokens):
    inputs = make_inputs(2, tokens, dtype=torch.float32)
    _, state = form(*inputs, lengths=torch.zeros(2, dtype=torch.long))
    assert torch.equal(state, inputs[6])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decay", [0.0, -1e-6, -50.0, -1e4, "mixed"])
def test_extreme_decay(decay, dtype):
    inputs = make_inputs(2, 130, dtype=dtype)
    with torch.no_grad():
        inputs[1].fill_(1.0)
        inputs[2].fill_(-60.0 if decay == "mixed" else decay)
        if decay == "mixed":
            inputs[1][:, 1::2] = 1e-3
            inputs[1][:, 3::11] = 1e-6
    expected = run(naive_mamba2, inputs)
    assert all(z.isfinite().all() for z in expected)
    assert_same(run(chunk_mamba2, inputs), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [1, 33])
def test_half_precision_in_fp32_state_out(tokens):
    inputs = [z.detach().bfloat16() for z in make_inputs(2, tokens, key_dim=16, value_dim=16, dtype=torch.float32)]
    y, state = mamba2(*inputs)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    expected_y, expected_state = naive_mamba2(*(z.float() for z in inputs))
    assert_same((state,), (expected_state,), 1e-5)
    assert_same((y.float(),), (expected_y,), 2**-8)
    leaves = [z.requires_grad_() for z in inputs]
    grads = torch.autograd.grad(mamba2(*leaves)[0].float().square().sum(), leaves)
    assert all(z.dtype == torch.bfloat16 for z in grads)


@pytest.mark.parametrize("form", [*FORMS, step_mamba2])
def test_autocast_changes_nothing(form):
    inputs = make_inputs(2, 1 if form is step_mamba2 else 33, key_dim=16, value_dim=16, dtype=torch.float32)

    def under_autocast(*inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return form(*inputs)

    assert all(torch.equal(a, b) for a, b in zip(run(under_autocast, inputs), run(form, inputs), strict=True))


@pytest.mark.parametrize("tokens", [1, 40])
def test_checkpointing_is_invisible(tokens):
    inputs = make_inputs(2, tokens)
    actual = run(lambda *z: checkpoint(mamba2, *z, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, run(mamba2, inputs), strict=True))


@pytest.mark.parametrize("tokens", [1, 16, 70])
def test_inputs_stay_and_results_own_their_memory(tokens):
    inputs = make_inputs(1, tokens)
    before = [z.detach().clone() for z in inputs]
    y, state = mamba2(*inputs)
    (y.sum() + state.sum()).backward()
    with torch.no_grad():
        y.zero_()
        state.zero_()
    assert all(torch.equal(z, w) for z, w in zip(inputs, before, strict=True))


@pytest.mark.parametrize("name", ["x", "B", "C", "initial_state"])
@pytest.mark.parametrize("tokens", [1, 34])
def test_inputs_may_be_strided(name, tokens):
    inputs = make_inputs(2, tokens)
    strided = [z.mT.contiguous().mT if n == name else z for n, z in zip(NAMES, inputs, strict=True)]
    assert_same(mamba2(*strided), mamba2(*inputs), 1e-12)


BAD_SHAPES = {
    "x": (2, 3, 5),
    "dt": (2, 3, 1),
    "A": (3,),
    "B": (2, 3, 3, 5),
    "C": (2, 3, 2, 4),
    "D": (1,),
    "initial_state": (2, 4, 7, 5),
    "lengths": (3,),
}


@pytest.mark.parametrize("name", BAD_SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_a_bad_shape_is_named(form, name):
    inputs = dict(zip(NAMES, make_inputs(2, 3), strict=True), lengths=torch.tensor([3, 3]))
    inputs[name] = torch.zeros(BAD_SHAPES[name])
    expected = "^" + re.escape(f"{name} has shape {BAD_SHAPES[name]}: it must be ")
    with pytest.raises(ValueError, match=expected):
        form(**inputs)


def test_step_refuses_more_than_a_token():
    with pytest.raises(ValueError, match=r"x has shape \(1, 2, 4, 7\): it must be \[B, 1, H, V\]"):
        step_mamba2(*make_inputs(1, 2))


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        mamba2(*make_inputs(1, 0))
