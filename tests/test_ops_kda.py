"""Kimi Delta Attention's operators against their naive form, and the laws that the rest of the package builds on."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from transformers.models.kimi_linear.modeling_kimi_linear import (
    chunk_kimi_delta_attention,
    recurrent_kimi_delta_attention,
)

from hf_sleep import ops
from hf_sleep.ops.kda import chunk_kda, kda, naive_kda, step_kda

NAMES = ("q", "k", "v", "g", "beta", "initial_state")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
FORMS = [naive_kda, chunk_kda, kda]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_inputs(batch, tokens, heads=2, key_dim=5, value_dim=7, dtype=torch.float64):
    """q, k, v, g, beta, initial_state, all of them leaves that want gradients."""
    q, k = (torch.randn(batch, tokens, heads, key_dim, dtype=dtype) for _ in range(2))
    v = torch.randn(batch, tokens, heads, value_dim, dtype=dtype)
    g = -torch.rand(batch, tokens, heads, key_dim, dtype=dtype)
    beta = torch.rand(batch, tokens, heads, dtype=dtype)
    state = torch.randn(batch, heads, key_dim, value_dim, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v, g, beta, state)]


def run(op, inputs, **kwargs):
    """The results of an operator, and the gradients of a loss that reads both of them unevenly."""
    results = op(*inputs, **kwargs)
    loss = sum((y.sin() * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in results)
    return [*results, *torch.autograd.grad(loss, inputs)]


def assert_same(actual, expected, tolerance):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale, msg=lambda m, i=i: f"result {i}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tokens", [1, 2, 3, 15, 33, 63, 64, 65, 130])
def test_chunk_equals_naive(tokens, dtype):
    inputs = make_inputs(2, tokens, dtype=dtype)
    expected = run(naive_kda, inputs)
    assert_same(run(chunk_kda, inputs), expected, TOLERANCE[dtype])
    assert_same(run(kda, inputs), expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("key_dim", "value_dim", "tokens"), [(1, 1, 20), (8, 3, 40), (128, 128, 70), (96, 256, 70)])
def test_chunk_equals_naive_at_other_widths(key_dim, value_dim, tokens):
    inputs = make_inputs(1, tokens, 1, key_dim, value_dim)
    assert_same(run(chunk_kda, inputs), run(naive_kda, inputs), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lengths", [None, [1, 0, 1]])
def test_step_equals_naive(lengths, dtype):
    inputs = make_inputs(3, 1, dtype=dtype)
    lengths = None if lengths is None else torch.tensor(lengths)
    expected = run(naive_kda, inputs, lengths=lengths)
    assert_same(run(step_kda, inputs, lengths=lengths), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("form", [*FORMS, step_kda])
def test_no_initial_state_is_zeros(form):
    *inputs, state = make_inputs(2, 1)
    assert_same(form(*inputs), form(*inputs, torch.zeros_like(state)), 0)


@pytest.mark.parametrize("tokens", [1, 70])
def test_one_decay_for_all_channels_is_the_gated_delta_rule(tokens):
    q, k, v, g, beta, state = make_inputs(2, tokens)
    g = g[..., :1].detach().requires_grad_()
    actual = run(lambda q, k, v, g, beta, S: kda(q, k, v, g.expand_as(k), beta, S), [q, k, v, g, beta, state])
    expected = run(
        lambda q, k, v, g, beta, S: ops.gated_delta_rule(q, k, v, g.squeeze(-1), beta, S), [q, k, v, g, beta, state]
    )
    assert_same(actual, expected, 1e-10)


@pytest.mark.parametrize("stock", [chunk_kimi_delta_attention, recurrent_kimi_delta_attention])
@pytest.mark.parametrize("tokens", [64, 100])
def test_equals_transformers(tokens, stock):
    inputs = make_inputs(2, tokens, heads=3, key_dim=16, value_dim=24, dtype=torch.float32)

    def theirs(q, k, v, g, beta, state):
        return stock(
            q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
        )

    assert_same(run(kda, inputs), run(theirs, inputs), 1e-4)


@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_gradcheck(tokens):
    inputs = make_inputs(2, tokens, heads=1, key_dim=2, value_dim=3)
    lengths = torch.tensor([tokens, tokens // 2])
    assert torch.autograd.gradcheck(lambda *x: kda(*x, lengths=lengths), inputs, fast_mode=True)


@settings(max_examples=25, deadline=None)
@given(pieces=st.lists(st.integers(1, 80), min_size=2, max_size=5))
def test_any_split_is_one_call(pieces):
    inputs = make_inputs(1, sum(pieces))

    def piecewise(q, k, v, g, beta, state):
        outputs = []
        for part in zip(*(x.split(pieces, 1) for x in (q, k, v, g, beta)), strict=True):
            o, state = kda(*part, state)
            outputs.append(o)
        return torch.cat(outputs, 1), state

    assert_same(run(piecewise, inputs), run(kda, inputs), 1e-10)


@pytest.mark.parametrize("poison", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("form", FORMS)
def test_pads_reach_nothing(form, poison):
    lengths = torch.tensor([0, 7, 65, 70])
    inputs = make_inputs(4, 70)
    with torch.no_grad():
        for x in inputs[:5]:
            for row, length in enumerate(lengths):
                x[row, length:] = poison
    o, state, *grads = run(form, inputs, lengths=lengths)
    assert torch.equal(state[0], inputs[5][0])
    for row, length in enumerate(lengths.tolist()):
        assert not o[row, length:].any()
        for x in grads[:5]:
            assert not x[row, length:].any()
        if length:
            alone = [x[row : row + 1, :length] for x in inputs[:5]] + [inputs[5][row : row + 1]]
            assert_same((o[row : row + 1, :length], state[row : row + 1]), naive_kda(*alone), 1e-10)
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 40, 70])
def test_pads_leave_the_state_exactly_as_it_is(form, tokens):
    inputs = make_inputs(2, tokens, dtype=torch.float32)
    _, state = form(*inputs, lengths=torch.zeros(2, dtype=torch.long))
    assert torch.equal(state, inputs[5])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decay", [0.0, -1e-6, -50.0, -1e4, -torch.inf, "mixed", "channels"])
def test_extreme_decay(decay, dtype):
    inputs = make_inputs(2, 130, dtype=dtype)
    with torch.no_grad():
        if decay == "mixed":
            inputs[3][:, ::7] = -60
            inputs[3][:, 3::11] = -1e-3
        elif decay == "channels":
            inputs[3].copy_(-torch.tensor([0, 1e-6, 1, 60, 1e4], dtype=dtype).expand_as(inputs[3]))
        else:
            inputs[3].fill_(decay)
    expected = run(naive_kda, inputs)
    assert all(x.isfinite().all() for x in expected)
    assert_same(run(chunk_kda, inputs), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_extreme_beta_and_repeated_keys(beta):
    inputs = make_inputs(1, 50, dtype=torch.float32)
    with torch.no_grad():
        inputs[1].copy_(inputs[1][:, :1].expand_as(inputs[1]))
        inputs[4].fill_(beta)
    assert_same(run(chunk_kda, inputs), run(naive_kda, inputs), 1e-4)


@pytest.mark.parametrize("tokens", [1, 40])
def test_zero_queries_and_keys_have_finite_gradients(tokens):
    inputs = make_inputs(1, tokens, dtype=torch.float32)
    with torch.no_grad():
        inputs[0].zero_()
        inputs[1].zero_()
    assert_same(run(kda, inputs), run(naive_kda, inputs), 1e-4)


@pytest.mark.parametrize("tokens", [1, 33])
def test_half_precision_in_fp32_state_out(tokens):
    inputs = [x.detach().bfloat16() for x in make_inputs(2, tokens, key_dim=16, value_dim=16, dtype=torch.float32)]
    o, state = kda(*inputs)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    expected_o, expected_state = naive_kda(*(x.float() for x in inputs))
    assert_same((state,), (expected_state,), 1e-5)
    assert_same((o.float(),), (expected_o,), 2**-8)
    leaves = [x.requires_grad_() for x in inputs]
    grads = torch.autograd.grad(kda(*leaves)[0].float().square().sum(), leaves)
    assert all(x.dtype == torch.bfloat16 for x in grads)


@pytest.mark.parametrize("form", [*FORMS, step_kda])
def test_autocast_changes_nothing(form):
    inputs = make_inputs(2, 1 if form is step_kda else 33, key_dim=16, value_dim=16, dtype=torch.float32)

    def under_autocast(*inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return form(*inputs)

    assert all(torch.equal(a, b) for a, b in zip(run(under_autocast, inputs), run(form, inputs), strict=True))


@pytest.mark.parametrize("tokens", [1, 40])
def test_checkpointing_is_invisible(tokens):
    inputs = make_inputs(2, tokens)
    actual = run(lambda *x: checkpoint(kda, *x, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, run(kda, inputs), strict=True))


@pytest.mark.parametrize("tokens", [1, 16, 70])
def test_inputs_stay_and_results_own_their_memory(tokens):
    inputs = make_inputs(1, tokens, heads=1)
    before = [x.detach().clone() for x in inputs]
    o, state = kda(*inputs)
    (o.sum() + state.sum()).backward()
    with torch.no_grad():
        o.zero_()
        state.zero_()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "initial_state"])
@pytest.mark.parametrize("tokens", [1, 34])
def test_inputs_may_be_strided(name, tokens):
    inputs = make_inputs(2, tokens)
    strided = [x.mT.contiguous().mT if n == name else x for n, x in zip(NAMES, inputs, strict=True)]
    assert_same(kda(*strided), kda(*inputs), 1e-12)


BAD_SHAPES = {
    "q": (2, 3, 5),
    "k": (2, 3, 2, 4),
    "v": (2, 4, 2, 7),
    "g": (2, 3, 2),
    "beta": (2, 3),
    "initial_state": (2, 2, 7, 5),
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
    with pytest.raises(ValueError, match=r"q has shape \(1, 2, 2, 5\): it must be \[B, 1, H, K\]"):
        step_kda(*make_inputs(1, 2))


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        kda(*make_inputs(1, 0))
