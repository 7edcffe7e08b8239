"""The fast operators against their naive forms, and the laws that the rest of the package builds on."""

import importlib.util
import re
import sys
import threading
import types
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from hf_sleep import ops
from hf_sleep.ops import chunked, delta_rule, fla

NAMES = ("q", "k", "v", "g", "beta", "initial_state")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
RULES = [ops.naive_gated_delta_rule, ops.chunk_gated_delta_rule, ops.gated_delta_rule]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_inputs(batch, tokens, heads=2, key_dim=5, value_dim=7, dtype=torch.float64):
    """q, k, v, g, beta, initial_state, all of them leaves that want gradients."""
    q, k = (torch.randn(batch, tokens, heads, key_dim, dtype=dtype) for _ in range(2))
    v = torch.randn(batch, tokens, heads, value_dim, dtype=dtype)
    g = -torch.rand(batch, tokens, heads, dtype=dtype)
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


# The gated delta rule.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tokens", [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130])
def test_chunk_equals_naive(tokens, dtype):
    inputs = make_inputs(2, tokens, dtype=dtype)
    expected = run(ops.naive_gated_delta_rule, inputs)
    assert_same(run(ops.chunk_gated_delta_rule, inputs), expected, TOLERANCE[dtype])
    assert_same(run(ops.gated_delta_rule, inputs), expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("key_dim", "value_dim", "tokens"), [(1, 1, 20), (8, 3, 40), (128, 128, 70), (96, 256, 70)])
def test_chunk_equals_naive_at_other_widths(key_dim, value_dim, tokens):
    inputs = make_inputs(1, tokens, 1, key_dim, value_dim)
    assert_same(run(ops.chunk_gated_delta_rule, inputs), run(ops.naive_gated_delta_rule, inputs), 1e-10)


@pytest.mark.parametrize(
    ("tokens", "size"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 16), (48, 16), (49, 32), (80, 16), (112, 32)]
)
def test_short_calls_are_not_padded_by_half_a_chunk(tokens, size):
    assert chunked.chunk_size(tokens) == size


@pytest.mark.parametrize("tokens", [16, 40, 100])
def test_what_backward_needs_changes_no_result(tokens):
    inputs = make_inputs(2, tokens)
    o, state = ops.chunk_gated_delta_rule(*inputs)
    with torch.no_grad():
        read, last = ops.chunk_gated_delta_rule(*inputs)
    assert torch.equal(read, o)
    assert torch.equal(last, state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lengths", [None, [1, 0, 1]])
def test_step_equals_naive(lengths, dtype):
    inputs = make_inputs(3, 1, dtype=dtype)
    lengths = None if lengths is None else torch.tensor(lengths)
    expected = run(ops.naive_gated_delta_rule, inputs, lengths=lengths)
    assert_same(run(ops.step_gated_delta_rule, inputs, lengths=lengths), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("rule", [*RULES, ops.step_gated_delta_rule])
def test_no_initial_state_is_zeros(rule):
    *inputs, state = make_inputs(2, 1)
    assert_same(rule(*inputs), rule(*inputs, torch.zeros_like(state)), 0)


@pytest.mark.parametrize("tokens", [64, 100])
def test_equals_transformers(tokens):
    inputs = make_inputs(2, tokens, heads=3, key_dim=16, value_dim=24, dtype=torch.float32)

    def theirs(q, k, v, g, beta, state):
        return torch_chunk_gated_delta_rule(
            q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
        )

    assert_same(run(ops.gated_delta_rule, inputs), run(theirs, inputs), 1e-4)


@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_gradcheck(tokens):
    inputs = make_inputs(2, tokens, heads=1, key_dim=2, value_dim=3)
    lengths = torch.tensor([tokens, tokens // 2])
    assert torch.autograd.gradcheck(lambda *x: ops.gated_delta_rule(*x, lengths=lengths), inputs, fast_mode=True)


@settings(max_examples=25, deadline=None)
@given(pieces=st.lists(st.integers(1, 40), min_size=2, max_size=6))
def test_any_split_is_one_call(pieces):
    tokens = sum(pieces)
    inputs = make_inputs(1, tokens)

    def piecewise(q, k, v, g, beta, state):
        outputs = []
        for part in zip(*(x.split(pieces, 1) for x in (q, k, v, g, beta)), strict=True):
            o, state = ops.gated_delta_rule(*part, state)
            outputs.append(o)
        return torch.cat(outputs, 1), state

    assert_same(run(piecewise, inputs), run(ops.gated_delta_rule, inputs), 1e-10)


@pytest.mark.parametrize("poison", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("rule", RULES)
def test_pads_reach_nothing(rule, poison):
    tokens, lengths = 40, torch.tensor([0, 7, 33, 40])
    inputs = make_inputs(4, tokens)
    with torch.no_grad():
        for x in inputs[:5]:
            for row, length in enumerate(lengths):
                x[row, length:] = poison
    o, state, *grads = run(rule, inputs, lengths=lengths)
    assert torch.equal(state[0], inputs[5][0])
    for row, length in enumerate(lengths.tolist()):
        assert not o[row, length:].any()
        for x in grads[:5]:
            assert not x[row, length:].any()
        if length:
            alone = [x[row : row + 1, :length] for x in inputs[:5]] + [inputs[5][row : row + 1]]
            o_alone, state_alone = ops.naive_gated_delta_rule(*alone)
            assert_same((o[row : row + 1, :length], state[row : row + 1]), (o_alone, state_alone), 1e-10)
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("rule", [ops.gated_delta_rule, ops.chunk_gated_delta_rule, ops.naive_gated_delta_rule])
def test_pads_leave_the_state_exactly_as_it_is(rule):
    for tokens in (1, 40):
        inputs = make_inputs(2, tokens, dtype=torch.float32)
        _, state = rule(*inputs, lengths=torch.zeros(2, dtype=torch.long))
        assert torch.equal(state, inputs[5])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decay", [0.0, -1e-6, -50.0, -1e4, -torch.inf, "mixed"])
def test_extreme_decay(decay, dtype):
    inputs = make_inputs(2, 70, dtype=dtype)
    with torch.no_grad():
        if decay == "mixed":
            inputs[3][:, ::7] = -60
            inputs[3][:, 3::11] = -1e-3
        else:
            inputs[3].fill_(decay)
    expected = run(ops.naive_gated_delta_rule, inputs)
    assert all(x.isfinite().all() for x in expected)
    assert_same(run(ops.chunk_gated_delta_rule, inputs), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_extreme_beta_and_repeated_keys(beta):
    inputs = make_inputs(1, 50, dtype=torch.float32)
    with torch.no_grad():
        inputs[1].copy_(inputs[1][:, :1].expand_as(inputs[1]))
        inputs[4].fill_(beta)
    expected = run(ops.naive_gated_delta_rule, inputs)
    assert_same(run(ops.chunk_gated_delta_rule, inputs), expected, 1e-4)


@pytest.mark.parametrize("tokens", [1, 40])
def test_zero_queries_and_keys_have_finite_gradients(tokens):
    inputs = make_inputs(1, tokens, dtype=torch.float32)
    with torch.no_grad():
        inputs[0].zero_()
        inputs[1].zero_()
    expected = run(ops.naive_gated_delta_rule, inputs)
    assert_same(run(ops.gated_delta_rule, inputs), expected, 1e-4)


@pytest.mark.parametrize("tokens", [1, 33])
def test_half_precision_in_fp32_state_out(tokens):
    inputs = [x.detach().bfloat16() for x in make_inputs(2, tokens, key_dim=16, value_dim=16, dtype=torch.float32)]
    o, state = ops.gated_delta_rule(*inputs)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    expected_o, expected_state = ops.naive_gated_delta_rule(*(x.float() for x in inputs))
    assert_same((state,), (expected_state,), 1e-5)
    assert_same((o.float(),), (expected_o,), 2**-8)
    leaves = [x.requires_grad_() for x in inputs]
    grads = torch.autograd.grad(ops.gated_delta_rule(*leaves)[0].float().square().sum(), leaves)
    assert all(x.dtype == torch.bfloat16 for x in grads)


@pytest.mark.parametrize("rule", [*RULES, ops.step_gated_delta_rule])
def test_autocast_changes_nothing(rule):
    tokens = 1 if rule is ops.step_gated_delta_rule else 33
    inputs = make_inputs(2, tokens, key_dim=16, value_dim=16, dtype=torch.float32)

    def under_autocast(*inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return rule(*inputs)

    assert all(torch.equal(a, b) for a, b in zip(run(under_autocast, inputs), run(rule, inputs), strict=True))


@pytest.mark.parametrize("tokens", [1, 40])
def test_checkpointing_is_invisible(tokens):
    inputs = make_inputs(2, tokens)
    expected = run(ops.gated_delta_rule, inputs)
    actual = run(lambda *x: checkpoint(ops.gated_delta_rule, *x, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_inputs_stay_and_results_own_their_memory(tokens):
    inputs = make_inputs(1, tokens, heads=1)
    before = [x.detach().clone() for x in inputs]
    o, state = ops.gated_delta_rule(*inputs)
    (o.sum() + state.sum()).backward(retain_graph=True)
    first = [x.grad.clone() for x in inputs]
    with torch.no_grad():
        o.zero_()
        state.zero_()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    o, state = ops.gated_delta_rule(*inputs)
    loss = o.sum() + state.sum()
    for _ in range(2):
        assert_same(torch.autograd.grad(loss, inputs, retain_graph=True), first, 0)


@pytest.mark.parametrize("name", NAMES[:3])
def test_inputs_may_be_strided(name):
    inputs = make_inputs(2, 34)
    strided = [x.mT.contiguous().mT if n == name else x for n, x in zip(NAMES, inputs, strict=True)]
    assert_same(ops.gated_delta_rule(*strided), ops.gated_delta_rule(*inputs), 1e-12)


def says(name, shape):
    return "^" + re.escape(f"{name} has shape {tuple(shape)}: it must be ")


BAD_SHAPES = {
    "q": (2, 3, 5),
    "k": (2, 3, 2, 4),
    "v": (2, 4, 2, 7),
    "g": (2, 3, 1),
    "beta": (2, 3),
    "initial_state": (2, 2, 7, 5),
    "lengths": (3,),
}


@pytest.mark.parametrize("name", BAD_SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_a_bad_shape_is_named(rule, name):
    inputs = dict(zip(NAMES, make_inputs(2, 3), strict=True), lengths=torch.tensor([3, 3]))
    inputs[name] = torch.zeros(BAD_SHAPES[name])
    with pytest.raises(ValueError, match=says(name, BAD_SHAPES[name])):
        rule(**inputs)


def test_step_refuses_more_than_a_token():
    with pytest.raises(ValueError, match=r"q has shape \(1, 2, 2, 5\): it must be \[B, 1, H, K\]"):
        ops.step_gated_delta_rule(*make_inputs(1, 2))


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        ops.gated_delta_rule(*make_inputs(1, 0))


# Who sees the gates.


def test_a_gate_hook_sees_the_calls_of_its_own_thread_while_it_is_open():
    q, k, v, g, beta, state = make_inputs(2, 3)
    lengths, seen, outer = torch.tensor([3, 1]), [], []
    with ops.gate_hook(lambda *gates: outer.append(gates)):
        with ops.gate_hook(lambda *gates: seen.append(gates)):
            ops.gated_delta_rule(q, k, v, g, beta, state, lengths)
            other = threading.Thread(target=ops.gated_delta_rule, args=(q, k, v, 2 * g, beta, state))
            other.start()
            other.join()
        ops.gated_delta_rule(q, k, v, g, beta, state)
    ops.gated_delta_rule(q, k, v, g, beta, state)
    assert [[id(x) for x in gates] for gates in seen] == [[id(g), id(beta), id(lengths)]]
    assert len(outer) == 2


def test_a_gate_hook_closes_when_what_it_watched_fails():
    with pytest.raises(ValueError, match="at least one token"), ops.gate_hook(lambda *gates: None):
        ops.gated_delta_rule(*make_inputs(1, 0))
    assert delta_rule._gates.hooks == ()


def test_a_step_is_traced_in_one_graph_and_again_for_a_hook():
    inputs, seen = [x.detach() for x in make_inputs(1, 1)], []
    step = torch.compile(ops.gated_delta_rule, backend="eager", fullgraph=True)
    assert_same(step(*inputs), ops.gated_delta_rule(*inputs), 0)
    with ops.gate_hook(lambda *gates: seen.append(len(gates))):
        step(*inputs)
    assert seen == [3]
    step(*inputs)
    assert seen == [3]


# Where it runs.


def test_a_cpu_uses_torch_and_never_imports_fla():
    assert ops.backend(torch.device("cpu")) == "torch"
    ops.gated_delta_rule(*make_inputs(1, 2))
    assert "fla" not in sys.modules


def test_a_gpu_without_fla_warns_once(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fla.is_available.cache_clear()
    with pytest.warns(UserWarning, match=r'slow torch fallback.*pip install "hf-sleep\[gpu\]"'):
        assert ops.backend(torch.device("cuda", 0)) == "torch"
    assert ops.backend("cuda") == "torch"
    fla.is_available.cache_clear()


@pytest.mark.parametrize("tokens", [1, 6])
def test_fla_is_called_as_its_documentation_says(monkeypatch, tokens):
    def kernel(*, q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel):
        assert scale == q.shape[-1] ** -0.5
        assert output_final_state
        assert use_qk_l2norm_in_kernel
        assert g.dtype == torch.float32
        return ops.naive_gated_delta_rule(q, k, v, g, beta, initial_state)

    module = types.ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = module.fused_recurrent_gated_delta_rule = kernel
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
    inputs = make_inputs(2, tokens, dtype=torch.float32)
    lengths = torch.tensor([tokens, tokens // 2])
    with torch.no_grad():
        inputs[2][1, tokens // 2 :] = torch.nan
    expected = ops.naive_gated_delta_rule(*inputs, lengths=lengths)
    assert_same(delta_rule._run(fla.fla_delta_rule, *inputs, lengths), expected, 1e-6)


@pytest.mark.parametrize(
    ("capability", "triton", "tilelang", "right"),
    [
        ((9, 0), "3.6.0", None, False),
        ((9, 0), "3.4.0rc1", None, False),
        ((9, 0), "3.7.0+git1", None, False),
        ((9, 0), "3.6.0", "1", True),
        ((9, 0), "3.6.0", "0", False),
        ((9, 0), "3.3.1", None, True),
        ((9, 0), "3.7.1", None, True),
        ((8, 0), "3.6.0", None, True),
        ((10, 0), "3.6.0", None, True),
    ],
)
def test_wrong_gradients_of_triton_on_hopper_are_not_used(monkeypatch, capability, triton, tilelang, right):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=triton))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if tilelang else None)
    monkeypatch.setenv("FLA_TILELANG", tilelang or "1")
    fla.has_backward.cache_clear()
    with nullcontext() if right else pytest.warns(UserWarning, match=r"Triton 3\..*wrong gradients.*triton>=3\.7\.1"):
        assert fla.has_backward(torch.device("cuda", 0)) is right
    fla.has_backward.cache_clear()


def test_amds_gpus_are_not_taken_for_hopper(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setitem(sys.modules, "triton", None)
    fla.has_backward.cache_clear()
    assert fla.has_backward(torch.device("cuda", 0))
    fla.has_backward.cache_clear()


class Card(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("has_backward", [True, False])
def test_fla_reads_where_it_may_not_be_trained_through(monkeypatch, has_backward):
    inputs = [x.detach().bfloat16().as_subclass(Card) for x in make_inputs(1, 4, dtype=torch.float32)]
    monkeypatch.setattr(fla, "backend", lambda device: "fla")
    monkeypatch.setattr(fla, "has_backward", lambda device: has_backward)
    monkeypatch.setattr(fla, "fla_delta_rule", lambda *inputs: "fla")
    monkeypatch.setattr(delta_rule, "chunked_delta_rule", lambda *inputs: "torch")
    assert delta_rule._fastest_delta_rule(*inputs) == "fla"
    inputs[2].requires_grad_()
    assert delta_rule._fastest_delta_rule(*inputs) == ("fla" if has_backward else "torch")
    with torch.no_grad():
        assert delta_rule._fastest_delta_rule(*inputs) == "fla"


# The short convolutions.


def make_convolution(kind, batch, tokens, channels=3, width=4, dtype=torch.float64):
    """The operator, and x, taps, conv_state."""
    x = torch.randn(batch, tokens, channels, dtype=dtype)
    taps = torch.randn(*((channels, width) if kind == "static" else (batch, tokens, channels, width)), dtype=dtype)
    state = torch.randn(batch, channels, width, dtype=dtype)
    op = ops.short_convolution if kind == "static" else ops.dynamic_short_convolution
    return op, [y.requires_grad_() for y in (x, taps, state)]


def naive_convolution(x, taps, conv_state, lengths=None):
    (batch, tokens, channels), width = x.shape, taps.shape[-1]
    rows, states = [], []
    for b in range(batch):
        real = tokens if lengths is None else int(lengths[b])
        past = torch.cat([conv_state[b].T, x[b, :real]])
        y = [(past[t + 1 : t + 1 + width].T * (taps if taps.dim() == 2 else taps[b, t])).sum(-1) for t in range(real)]
        rows.append(torch.stack(y + [x.new_zeros(channels)] * (tokens - real)))
        states.append(past[-width:].T)
    return torch.stack(rows), torch.stack(states)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_convolution_equals_naive(kind, tokens, width, dtype):
    op, inputs = make_convolution(kind, 2, tokens, width=width, dtype=dtype)
    for first in (None, tokens, tokens - 1, 0):
        lengths = None if first is None else torch.tensor([first, tokens])
        expected = run(lambda *x, n=lengths: naive_convolution(*x, n), inputs)
        assert_same(run(op, inputs, lengths=lengths), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_convolution_pads_reach_nothing(kind):
    op, inputs = make_convolution(kind, 3, 6)
    lengths = torch.tensor([0, 2, 6])
    expected = run(lambda *x: naive_convolution(*x, lengths), inputs)
    with torch.no_grad():
        for row, length in enumerate(lengths):
            inputs[0][row, length:] = torch.nan
            if kind == "dynamic":
                inputs[1][row, length:] = torch.inf
    assert_same(run(op, inputs, lengths=lengths), expected, 1e-10)


@settings(max_examples=25, deadline=None)
@given(pieces=st.lists(st.integers(1, 6), min_size=2, max_size=6), kind=st.sampled_from(["static", "dynamic"]))
def test_any_split_of_a_convolution_is_one_call(pieces, kind):
    op, inputs = make_convolution(kind, 2, sum(pieces))

    def piecewise(x, taps, state):
        outputs = []
        parts = [taps] * len(pieces) if kind == "static" else taps.split(pieces, 1)
        for x_part, taps_part in zip(x.split(pieces, 1), parts, strict=True):
            y, state = op(x_part, taps_part, state)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    assert_same(run(piecewise, inputs), run(op, inputs), 1e-12)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_convolution_details(kind, tokens):
    op, (x, taps, state) = make_convolution(kind, 2, tokens)
    assert_same(op(x, taps), op(x, taps, torch.zeros_like(state)), 0)
    unread = state.detach().clone()
    unread[..., 0] = torch.nan
    assert torch.equal(op(x, taps, unread)[0], op(x, taps, state)[0])
    low = [y.detach().bfloat16() for y in (x, taps, state)]
    y, new_state = op(*low)
    assert (y.dtype, new_state.dtype) == (torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(y, op(*(z.double() for z in low))[0].bfloat16(), rtol=2**-7, atol=1e-6)
    assert torch.autograd.gradcheck(op, (x, taps, state), fast_mode=True)
    assert new_state.untyped_storage().nbytes() == new_state.numel() * 2


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("static", "x", (2, 5)),
        ("static", "weight", (4, 3)),
        ("dynamic", "x", (2, 0, 3)),
        ("dynamic", "taps", (2, 4, 3, 4)),
        ("static", "conv_state", (2, 4, 3)),
        ("dynamic", "conv_state", (2, 3, 3)),
        ("dynamic", "lengths", (1,)),
    ],
)
def test_a_bad_convolution_shape_is_named(kind, name, shape):
    op, (x, taps, state) = make_convolution(kind, 2, 5)
    inputs = {"x": x, "weight" if kind == "static" else "taps": taps, "conv_state": state, "lengths": None}
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=says(name, shape)):
        op(**inputs)
