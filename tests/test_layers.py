"""Fast-weight blocks: the contract of their mixers, over those of the package and one from outside it."""

import pytest
import torch
from families import make_base, randomize, tokens
from torch import nn
from transformers import initialization as init

from hf_sleep import SleepConfig, SleepForCausalLM, register_block
from hf_sleep.layers import FastWeightBlock, FastWeightMixer
from hf_sleep.memory import FastWeights
from hf_sleep.registry import BLOCKS

KINDS = ("gated_delta_net", "jet", "mine")
SIZES = {"hidden_size": 12, "num_heads": 2, "head_dim": 4, "expand_v": 1.5, "conv_size": 3}
PROJECTIONS = [f"{name}_proj.weight" for name in "qkvabg"]


class Mine(FastWeightMixer):
    """Linear attention that forgets nothing and convolves nothing."""

    fp32_parameters = ("strength",)

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, expand_v: float, conv_size: int):
        super().__init__(hidden_size, num_heads, head_dim, expand_v, conv_size)
        self.make = nn.Linear(hidden_size, num_heads * (2 * head_dim + self.head_v_dim), bias=False)
        self.strength = nn.Parameter(torch.zeros(num_heads))
        self.out = nn.Linear(num_heads * self.head_v_dim, hidden_size, bias=False)

    def empty(self, batch_size, device, dtype):
        shape = (batch_size, self.num_heads, self.head_dim, self.head_v_dim)
        recurrent_state = torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return FastWeights(recurrent_state, torch.zeros(batch_size, 0, self.conv_size, device=device, dtype=dtype))

    def forward(self, x, fast_weights, lengths=None, decays=True):
        state, conv_state = fast_weights
        made = self.make(x).unflatten(-1, (self.num_heads, -1)).to(state.dtype)
        q, k, v = made.split((self.head_dim, self.head_dim, self.head_v_dim), -1)
        k = k * self.strength.exp()[:, None]
        if lengths is not None:
            pad = torch.arange(x.shape[1]) >= lengths[:, None]
            k, v = (z.masked_fill(pad[:, :, None, None], 0) for z in (k, v))
        states = state[:, None] + (k[..., None] * v[..., None, :]).cumsum(1)
        o = (q[..., None] * states).sum(-2).flatten(-2)
        return self.out(o.to(x.dtype)), FastWeights(states[:, -1], conv_state)

    def init_weights(self, std, generator=None):
        init.normal_(self.make.weight, std=std, generator=generator)
        init.zeros_(self.strength)
        init.zeros_(self.out.weight)

    @property
    def is_untrained(self):
        return not self.out.weight.is_meta and not bool(self.out.weight.any())


@pytest.fixture(autouse=True)
def _mine():
    register_block("mine")(Mine)
    yield
    del BLOCKS._classes["mine"]


def make_block(kind: str, trained: bool = True) -> FastWeightBlock:
    block = FastWeightBlock(kind, **SIZES)
    block.init_weights(0.5, torch.Generator().manual_seed(0))
    if trained:
        randomize(block, 1)
    return block


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, SIZES["hidden_size"], generator=torch.Generator().manual_seed(2)).to(dtype)


def sleep_config(**fields) -> SleepConfig:
    sizes = {"block_num_heads": 2, "block_head_dim": 8, "block_layers": (0, 2)}
    return SleepConfig(window_size=6, block_kind="mine", **sizes, **fields)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_fast_weights_are_zeros_of_what_forward_returns(kind, dtype):
    block, x = make_block(kind).to(dtype), inputs(3, 5, dtype=dtype)
    empty = block.empty(3, x.device, dtype)
    mixed, carried = block(x, empty)
    assert type(empty) is type(carried) is FastWeights
    assert not any(t.any() for t in empty)
    assert [t.shape for t in empty] == [t.shape for t in carried]
    assert empty.recurrent_state.shape == (3, 2, 4, 6)
    assert (len(empty.conv_state), empty.conv_state.shape[-1]) == (3, 3)
    assert mixed.dtype == empty.conv_state.dtype == carried.conv_state.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert empty.recurrent_state.dtype == carried.recurrent_state.dtype == wide


@pytest.mark.parametrize("kind", KINDS)
def test_fast_weights_are_values_that_pads_leave_as_they_are(kind):
    block, x = make_block(kind), inputs(2, 7)
    _, before = block(x, block.empty(2, x.device, x.dtype))
    copies = [t.clone() for t in before]
    _, after = block(x, before, torch.tensor([0, 4]))
    assert all(torch.equal(t, copy) for t, copy in zip(before, copies, strict=True))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(after, before, strict=True))
    assert not torch.equal(after.recurrent_state[1], before.recurrent_state[1])


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_is_one_call_and_lets_gradients_through(kind):
    block, x = make_block(kind).double(), inputs(2, 7, dtype=torch.float64).requires_grad_()
    whole, at_end = block(x, block.empty(2, x.device, x.dtype))
    first, between = block(x[:, :4], block.empty(2, x.device, x.dtype))
    second, after = block(x[:, 4:], between)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=0, atol=1e-12)
    for a, b in zip(after, at_end, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(second.square().sum(), x)
    assert (gradient[:, :4] != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_block_adds_zero_until_it_is_trained(kind):
    block, x = make_block(kind, trained=False), inputs(2, 5)
    assert block.is_untrained
    y, _ = block(x, block.empty(2, x.device, x.dtype))
    assert torch.equal(y, x)
    y.square().sum().backward()
    reached = [parameter for parameter in block.parameters() if parameter.grad is not None and parameter.grad.any()]
    assert len(reached) == 1
    with torch.no_grad():
        reached[0] -= 0.1 * reached[0].grad
    assert not block.is_untrained
    assert not FastWeightBlock(kind, **SIZES).to("meta").is_untrained


@pytest.mark.parametrize("kind", KINDS)
def test_some_parameters_stay_wide(kind):
    block = make_block(kind)
    wide = {name for name, _ in block.named_parameters() if name.rpartition(".")[2] in block.fp32_parameters}
    assert block.fp32_parameters == (("strength",) if kind == "mine" else ("A_log", "dt_bias"))
    assert len(wide) == len(block.fp32_parameters)
    values = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    for dtype in (torch.bfloat16, torch.float16):
        block.to(dtype)
        assert {name for name, p in block.named_parameters() if p.dtype == torch.float32} == wide
        assert {p.dtype for name, p in block.named_parameters() if name not in wide} == {dtype}
    assert all(torch.equal(block.get_parameter(name), values[name]) for name in wide)
    assert {p.dtype for p in block.double().parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("kind", "convolution", "channels"),
    [
        ("gated_delta_net", ["conv_weight"], 28),
        ("jet", [f"dynamic_conv1d.kernel_generator.{name}" for name in ("w1.weight", "w2.weight", "w2.bias")], 12),
    ],
)
def test_names_in_a_checkpoint_stay_in_their_order(kind, convolution, channels):
    own, tail = ["A_log", "dt_bias"], [*PROJECTIONS, "o_norm.weight", "o_proj.weight"]
    names = [*own, *convolution, *tail] if convolution == ["conv_weight"] else [*own, *tail, *convolution]
    block = FastWeightBlock(kind, **SIZES)
    assert list(block.state_dict()) == ["norm.weight", *(f"mixer.{name}" for name in names)]
    assert block.empty(1, torch.device("cpu"), torch.float32).conv_state.shape == (1, channels, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_width_that_is_no_whole_number_is_refused(kind):
    with pytest.raises(ValueError, match=r"expand_v=1.3 gives heads of 5.2 values; head_dim=4 times expand_v must be"):
        FastWeightBlock(kind, **SIZES | {"expand_v": 1.3})


def test_an_unknown_block_is_refused_with_what_works():
    del BLOCKS._classes["mine"]
    with pytest.raises(ValueError, match=r"block_kind='mine' cannot work: .* gated_delta_net, jet, .*register_block"):
        sleep_config()
    register_block("mine")(Mine)
    assert sleep_config().block_kind == "mine"


@pytest.mark.parametrize("passes", [1, 3])
def test_a_block_from_outside_sleeps(passes):
    base, ids = make_base("llama"), tokens(15).view(1, 15)
    model = SleepForCausalLM.from_base(base, sleep_config(sleep_passes=passes, num_sink_tokens=1, eviction="sliding"))
    assert all(type(block.mixer) is Mine and block.is_untrained for block in model.fast_weights.values())
    assert torch.equal(model(ids[:, :6]).logits, base(ids[:, :6]).logits)
    randomize(model.fast_weights, 1)

    whole = model(ids, labels=ids)
    whole.loss.backward()
    for name, parameter in model.fast_weights.named_parameters():
        assert parameter.grad.any(), name

    # Left pads change nothing, nor does reading in two calls, and the first window is remembered.
    with torch.no_grad():
        padded = torch.cat((ids.new_zeros(1, 4), ids), 1)
        out = model(padded, attention_mask=(padded != 0).long())
        torch.testing.assert_close(out.logits[:, 4:], whole.logits, rtol=0, atol=1e-5)
        first = model(ids[:, :8])
        second = model(ids[:, 8:], cache=first.cache)
        torch.testing.assert_close(second.logits, whole.logits[:, 8:], rtol=0, atol=1e-5)
        other = ids.clone()
        other[:, 1:3] = ids[:, 1:3] % 60 + 1
        assert not torch.allclose(model(other).logits[:, -1], whole.logits[:, -1], atol=1e-3)
