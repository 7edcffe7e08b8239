"""Fast-weight blocks: the contract of their mixers, over those of the package and one from outside it."""

import math

import pytest
import torch
import torch.nn.functional as F
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


# Half-lives at first.

DECAYING = ("gated_delta_net", "jet")


def fresh_block(kind: str, half_lives: tuple[float, float] | None, heads: int = 5, seed: int = 0) -> FastWeightBlock:
    block = FastWeightBlock(kind, **SIZES | {"num_heads": heads}, half_lives=half_lives)
    block.init_weights(0.02, torch.Generator().manual_seed(seed))
    return block


def measured(block: FastWeightBlock, a: float = 0.0) -> torch.Tensor:
    """Half-life of each head (tokens) where a(x) is `a`."""
    x = torch.ones(1, 1, SIZES["hidden_size"], dtype=block.norm.weight.dtype)
    with torch.no_grad():
        block.mixer.a_proj.weight.fill_(a / SIZES["hidden_size"])
        return -math.log(2) / block.mixer.decay(x)[0, 0]


@pytest.mark.parametrize(("heads", "expected"), [(1, [16.0]), (2, [2.0, 128.0]), (4, [2.0, 8.0, 32.0, 128.0])])
@pytest.mark.parametrize("kind", DECAYING)
def test_half_lives_are_spread_evenly_in_the_logarithm(kind, heads, expected):
    wide = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(measured(fresh_block(kind, (2.0, 128.0), heads)), wide.float(), rtol=1e-5, atol=0)
    block = FastWeightBlock(kind, **SIZES | {"num_heads": heads}, half_lives=(2.0, 128.0)).double()
    block.init_weights(0.02)
    torch.testing.assert_close(measured(block), wide, rtol=1e-12, atol=0)


@pytest.mark.parametrize("half_lives", [(0.05, 0.5), (1e3, 1e7), (7.0, 7.0)])
@pytest.mark.parametrize("kind", DECAYING)
def test_very_short_and_very_long_half_lives_are_as_exact(kind, half_lives):
    block = fresh_block(kind, half_lives, heads=2)
    torch.testing.assert_close(measured(block), torch.tensor(half_lives), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", DECAYING)
def test_half_of_what_is_held_is_left_after_a_half_life(kind):
    """Through the recurrence, over tokens that write nothing."""
    block = FastWeightBlock(kind, **SIZES | {"num_heads": 5}, half_lives=(2.0, 32.0)).double()
    block.init_weights(0.02)
    fast_weights = block.empty(1, torch.device("cpu"), torch.float64)
    held = torch.randn(fast_weights.recurrent_state.shape, dtype=torch.float64)
    for head, tokens_read in enumerate((2, 4, 8, 16, 32)):
        _, after = block(
            torch.zeros(1, tokens_read, 12, dtype=torch.float64), fast_weights._replace(recurrent_state=held)
        )
        torch.testing.assert_close(after.recurrent_state[:, head], held[:, head] / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", DECAYING)
def test_the_input_divides_a_half_life_by_e_to_the_a_in_both_directions(kind):
    nominal = measured(fresh_block(kind, (50.0, 5000.0)))
    for a in (-3.0, -1.0, 1.0, 3.0):
        torch.testing.assert_close(
            measured(fresh_block(kind, (50.0, 5000.0)), a), nominal * math.exp(-a), rtol=0.15, atol=0
        )
    assert (measured(fresh_block(kind, (50.0, 5000.0)), 10.0) < 1).all()


@pytest.mark.parametrize("kind", DECAYING)
def test_on_random_inputs_the_median_is_near_what_was_asked(kind):
    block = FastWeightBlock(kind, 256, 3, 4, 1.0, 4, half_lives=(8.0, 512.0))
    block.init_weights(0.02, torch.Generator().manual_seed(0))
    x = torch.randn(1, 1000, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        half_lives = -math.log(2) / block.mixer.decay(block.norm(x))[0]
    torch.testing.assert_close(half_lives.median(0).values, torch.tensor([8.0, 64.0, 512.0]), rtol=0.1, atol=0)


@pytest.mark.parametrize("kind", DECAYING)
def test_without_half_lives_the_gates_are_mambas_and_nothing_else_differs(kind):
    plain, spread = (dict(fresh_block(kind, asked, heads=64).named_parameters()) for asked in (None, (2.0, 128.0)))
    drawn = FastWeightBlock(kind, **SIZES | {"num_heads": 64}).mixer
    drawn.draw_weights(0.02, torch.Generator().manual_seed(0))
    gates = [f"mixer.{name}" for name in ("A_log", "dt_bias")]
    for name in gates:
        assert torch.equal(plain[name], drawn.get_parameter(name.removeprefix("mixer.")))
    assert all(torch.equal(value, plain[name]) for name, value in spread.items() if name not in gates)
    rate, step = plain[gates[0]].exp(), F.softplus(plain[gates[1]])
    assert 0 < rate.min() < 2 < 14 < rate.max() < 16
    assert 0.99e-3 < step.min() < 2e-3 < 0.05 < step.max() < 0.101
    assert 2 < (math.log(2) / (rate * step)).median() < 20


class Told(Mine):
    """Keeps what half-lives it is told."""

    def init_half_lives(self, half_lives):
        assert not self.out.weight.any()
        self.told = half_lives


def test_a_mixer_from_outside_is_told_its_half_lives_or_has_none():
    asked, unasked = (dict(fresh_block("mine", half_lives).named_parameters()) for half_lives in ((2.0, 8.0), None))
    assert all(torch.equal(value, unasked[name]) for name, value in asked.items())
    del BLOCKS._classes["mine"]
    register_block("mine")(Told)
    told = fresh_block("mine", (2.0, 8.0), heads=3).mixer.told
    torch.testing.assert_close(told, torch.tensor([2.0, 4.0, 8.0], dtype=torch.float64), rtol=1e-12, atol=0)
    assert not hasattr(fresh_block("mine", None).mixer, "told")


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


@pytest.mark.parametrize("kind", ["gated_delta_net", "jet"])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_no_output_is_a_view_where_gradients_are_wanted(kind, length):
    """FSDP2 cannot watch one."""
    block = FastWeightBlock(kind, 32, 2, 8, 2.0, 4)
    block.init_weights(0.02)
    x, fast_weights = block(torch.randn(2, length, 32), block.empty(2, torch.device("cpu"), torch.float32))
    assert not any(t._is_view() for t in (x, *fast_weights))
