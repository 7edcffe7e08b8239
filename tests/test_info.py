"""Facts that `describe` reads off a config are what a model with values holds, has and spends."""

import copy
import json

import pytest
import torch
from families import FAMILIES, make_base, make_model, sleep_config, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, DynamicCache

from hf_sleep import SleepCache, SleepConfig, SleepForCausalLM, SleepLMConfig, ops
from hf_sleep.compat import CACHE
from hf_sleep.engine import Span
from hf_sleep.info import SleepInfo, SlotInfo, describe
from hf_sleep.ops.kda import step_kda

HARD = {"sleep_passes": 3, "num_sink_tokens": 2, "loop_layers": (1, 3)}
SLIDING = {"sleep_passes": 4, "eviction": "sliding", "num_sink_tokens": 3, "loop_layers": (0, 2)}
HARD_ONES = ("llama", "gemma3", "qwen3_next", "olmo_hybrid", "ouro")
SLEEPS = [
    *(pytest.param(family, SLIDING, id=f"{family}-sliding") for family in FAMILIES),
    *(pytest.param(family, HARD, id=f"{family}-hard") for family in HARD_ONES),
]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *SLEEPS,
        pytest.param("llama", {"sleep_passes": 2}, id="llama-hard-plain"),
        pytest.param("llama", {"sleep_passes": 1, "eviction": "sliding"}, id="llama-sliding-plain"),
    ],
)
def test_memory_is_what_a_model_holds_that_has_slept(family: str, settings: dict) -> None:
    sleep = sleep_config(family, **settings)
    model = make_model(family, sleep)
    info = describe(model.lm.config, sleep, torch.float32)
    cache, size = SleepCache(), sleep.window_size
    held = []
    with torch.no_grad():
        for window in tokens(5 * size).view(5, 1, size):
            # A window less one token, then the one that fills it.
            for part in (window[:, :-1], window[:, -1:]):
                model(part, cache=cache)
                held.append((cache.kv_bytes(), cache.num_bytes()))
                assert cache.fast_weight_bytes() == info.fast_weight_bytes
    assert max(kv for kv, _ in held) == info.kv_bytes
    assert max(total for _, total in held) == info.num_bytes
    assert cache.max_kv_length == info.kv_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_parameters_are_the_models(family: str) -> None:
    sleep = sleep_config(family, loop_layers=(1, 3))
    model = make_model(family, sleep)
    info = describe(model.lm.config, sleep)
    assert info.parameters == sum(p.numel() for p in model.lm.parameters())
    assert info.added_parameters == sum(p.numel() for p in model.fast_weights.parameters()) > 0
    assert info.added_percent == 100 * info.added_parameters / info.parameters
    order = model._sleeper().order
    assert (info.slots, info.loop) == (tuple(map(SlotInfo.of, order.slots)), order.loop)
    assert info.sleep == model.config.sleep
    assert sum(info.layer_kinds.values()) == 4
    assert info.loop_text == "1..2 of 4"


def test_kinds_of_layers_are_counted_apart() -> None:
    assert describe(make_base("llama").config).layer_kinds == {"full_attention": 4}
    assert describe(make_base("gemma3").config).layer_kinds == {"sliding_attention": 2, "full_attention": 2}
    assert describe(make_base("qwen3_next").config).layer_kinds == {"linear_attention": 2, "full_attention": 2}


@pytest.mark.parametrize("family", ["llama", "gemma3", "ouro"])
def test_the_plain_base_is_compared_at_its_longest(family: str) -> None:
    base = make_base(family)
    base.config.max_position_embeddings = 20
    if family == "ouro":
        base.config.total_ut_steps = 3
    cache = DynamicCache(config=base.config)
    with torch.no_grad():
        base(tokens(20)[None], **{CACHE: cache})
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    info = describe(base.config, sleep_config(family), torch.float32)
    # transformers keeps one token less than a layer's window, because the next token is of the window too.
    short = sum(kind == "sliding_attention" for kind in getattr(base.config, "layer_types", ()))
    assert info.base_kv_bytes == held + short * info.kv_bytes_per_token // 4


def token_by_token(q, k, v, g, beta, state, lengths=None):
    """The gated delta rule as its formula has it, 6 K V FLOPs for every head and token, and no chunks."""
    outputs = []
    for t in range(q.shape[1]):
        o, state = ops.step_gated_delta_rule(*(x[:, t : t + 1] for x in (q, k, v, g, beta)), state)
        outputs.append(o)
    return torch.cat(outputs, 1), state


def mamba2_token_by_token(x, dt, A, B, C, D, state, lengths=None):
    """Mamba2 as its formula has it, 4 K V FLOPs for every head and token."""
    outputs, groups = [], x.shape[2] // B.shape[2]
    B, C = (z.repeat_interleave(groups, dim=2).unsqueeze(-2) for z in (B, C))
    for t in range(x.shape[1]):
        state = state * (dt[:, t] * A).exp()[..., None, None] + B[:, t].mT @ (dt[:, t, :, None] * x[:, t]).unsqueeze(-2)
        outputs.append((C[:, t] @ state).squeeze(-2) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1), state


def kda_token_by_token(q, k, v, g, beta, state, lengths=None):
    """Kimi Delta Attention as its formula has it, 6 K V FLOPs for every head and token."""
    outputs = []
    for t in range(q.shape[1]):
        o, state = step_kda(*(x[:, t : t + 1] for x in (q, k, v, g, beta)), state)
        outputs.append(o)
    return torch.cat(outputs, 1), state


def in_place_flops(shape, a, b, out_shape=None, **_) -> int:
    return 2 * a[0] * a[1] * a[2] * b[2]


def spent(run) -> int:
    """FLOPs of the matrix products in `run`, those of attention and those written in place among them."""
    in_place = {torch.ops.aten.baddbmm_: in_place_flops}
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=in_place) as flops,
    ):
        run()
    return flops.get_total_flops()


def spent_by_a_stream(model, size: int) -> tuple[int, int, int]:
    """FLOPs of a window read, of the sleep on it, and of a token in the middle of the next one."""
    cache, sleeper = SleepCache(), model._sleeper()
    with torch.no_grad():
        model(tokens(3 * size)[None], cache=cache)
        model.sleep(cache)
        x = model.decoder.embed(tokens(size)[None])
    span = Span([0], [0], [size], is_wanted=True, sleeps_next=False)
    read = spent(lambda: sleeper.wake(cache.memory, span, x))
    with torch.no_grad():
        model(tokens(size)[None], cache=cache)
    slept = spent(lambda: model.sleep(cache))
    with torch.no_grad():
        model(tokens(size // 2 - 1)[None], cache=cache)
    return read, slept, spent(lambda: model(tokens(1)[None], cache=cache))


@pytest.mark.parametrize(("family", "settings"), SLEEPS)
def test_flops_are_the_matrix_products_of_a_model(family: str, settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("bases.gated_delta_net", "layers.recurrence"):
        monkeypatch.setattr(f"hf_sleep.{module}.gated_delta_rule", token_by_token)
    monkeypatch.setattr("hf_sleep.bases.mamba2.mamba2", mamba2_token_by_token)
    monkeypatch.setattr("hf_sleep.bases.kimi_linear.kda", kda_token_by_token)
    sleep = sleep_config(family, **settings)
    model = make_model(family, sleep)
    info = describe(model.lm.config, sleep)

    def elementwise(slots: range) -> int:
        """Parameters that no matrix product uses: norms, biases, gates, taps of static convolutions."""
        return sum(
            p.numel() * model.lm.config.num_experts_per_tok // len(p) if ".experts." in name else p.numel()
            for i in slots
            for name, p in module_of(info, model, i).named_parameters()
            if p.ndim < 2 or name.endswith(("conv1d.weight", "A_log", "proj_bias"))
        )

    size = sleep.window_size
    everything, tail = range(len(info.slots)), range(info.loop.stop, len(info.slots))
    if sleep.eviction == "hard":  # after the last fast weights, the last pass is left out
        last = max(i for i, slot in enumerate(info.slots) if slot.role in ("block", "linear"))
        tail = range(info.loop.stop, max(info.loop.stop, last + 1))
        in_loop = range(info.loop.start, min(info.loop.stop, last + 1))
    else:
        in_loop = info.loop
    again = (sleep.sleep_passes - 2) * elementwise(info.loop) + elementwise(in_loop) + elementwise(tail)
    read, slept, token = spent_by_a_stream(model, size)
    assert read == info.read_flops - 2 * size * elementwise(everything)
    assert slept == info.sleep_flops - 2 * size * again
    assert token == info.token_flops - 2 * elementwise(everything)


def module_of(info: SleepInfo, model, i: int) -> torch.nn.Module:
    slot = info.slots[i]
    if slot.role == "norm":
        return torch.nn.Identity()
    return model.fast_weights[str(slot.index)] if slot.role == "block" else model.decoder.layers[slot.index]


def test_flops_are_close_to_what_the_kernels_spend() -> None:
    """Measured: -0.4 % (read), -0.6 % (sleep), +0.1 % (token).

    The chunked kernel multiplies within its chunks of 32 tokens too, which the formula leaves out and which weighs less
    the wider the model: -0.2 % at the size of SmolLM2-135M with L = 512. In the other direction, norms and biases count
    as if they were matrix products.
    """
    config = make_base("llama").config
    config.hidden_size, config.intermediate_size, config.head_dim = 384, 1024, 64
    sleep = SleepConfig(window_size=128, sleep_passes=3, loop_layers=(1, 3))
    info = describe(config, sleep)
    model = SleepForCausalLM(SleepLMConfig(text_config=config, sleep=sleep)).eval()
    stated = (info.read_flops, info.sleep_flops, info.token_flops)
    assert stated == pytest.approx(spent_by_a_stream(model, 128), rel=0.01)


def test_a_sleep_is_put_in_reads_and_in_tokens() -> None:
    config = make_base("llama").config
    assert describe(config, sleep_config("llama", sleep_passes=1)).sleep_flops == 0
    assert describe(config, sleep_config("llama", sleep_passes=4)).sleep_in_reads < 3  # no layer after the last block
    info = describe(config, sleep_config("llama", sleep_passes=4, eviction="sliding"))
    assert info.sleep_in_reads == 3
    assert info.sleep_in_tokens == 3 * info.read_flops / info.token_flops


def test_seventy_billion_parameters_cost_nothing() -> None:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    )
    info = describe(config)
    assert info.parameters == 70_553_706_496  # Llama 3 70B
    assert info.kv_bytes_per_token == 80 * 2 * 8 * 128 * 2


def test_json_round_trip() -> None:
    info = describe(make_base("qwen3_next").config, sleep_config("qwen3_next", loop_layers=(1, 3)))
    written = info.to_dict()
    assert json.loads(json.dumps(written)) == written
    assert SleepConfig.from_dict(written["sleep"]) == info.sleep
    assert [(slot["role"], slot["index"], slot["loops"]) for slot in written["slots"]] == [
        ("linear", 0, False),
        ("attention", 1, True),
        ("block", 1, True),
        ("linear", 2, True),
        ("attention", 3, False),
    ]
    assert {name for name in written if written[name] != getattr(info, name)} == {"sleep", "slots"}


def test_the_dtype_is_the_one_given_or_the_configs_or_bfloat16() -> None:
    config = make_base("llama").config
    config.dtype = None
    assert describe(config).dtype == "bfloat16"
    config.dtype = torch.float32
    full = describe(config)
    assert full.dtype == "float32"
    assert describe(SleepLMConfig(text_config=config, dtype=torch.float64)).dtype == "float64"
    half = describe(config, dtype=torch.float16)
    assert half.dtype == "float16"
    assert full.kv_bytes == 2 * half.kv_bytes
    assert half.fast_weight_bytes < full.fast_weight_bytes < 2 * half.fast_weight_bytes  # states are fp32 in both


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_experts_need_no_kernel_of_that_dtype(dtype: torch.dtype) -> None:
    assert describe(make_base("qwen3_next").config, dtype=dtype).kv_bytes_per_token == 2 * 2 * 2 * 8 * dtype.itemsize


def test_rope_that_looks_at_the_positions() -> None:
    config = make_base("llama").config
    plain = describe(config)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert describe(config) == plain


def test_the_config_is_left_as_it_was() -> None:
    config = make_base("qwen3_next").config
    before = copy.deepcopy(config)
    describe(config)
    assert config.to_dict() == before.to_dict()
    assert config._attn_implementation == before._attn_implementation == "sdpa"
    assert config._experts_implementation == before._experts_implementation == "eager"


def test_a_sleep_checkpoint_keeps_its_settings_but_those_that_are_given() -> None:
    saved = sleep_config("llama", sleep_passes=3, eviction="sliding")
    config = SleepLMConfig(text_config=make_base("llama").config, sleep=saved)
    info = describe(config)
    assert info.is_checkpoint
    assert info.sleep == config.sleep
    assert describe(config, {"sleep_passes": 5}).sleep == SleepConfig(
        **{**config.sleep.to_dict(), "sleep_passes": 5, "loop_layers": (0, 4), "block_layers": (0, 2)}
    )
    with pytest.raises(ValueError, match="the checkpoint's blocks have block_num_heads=2"):
        describe(config, {"block_num_heads": 4})


def test_a_dictionary_sets_fields_of_a_base() -> None:
    config = make_base("llama").config
    assert not describe(config).is_checkpoint
    assert describe(config, {"window_size": 6}) == describe(config, SleepConfig(window_size=6)) != describe(config)


def test_what_cannot_sleep_is_refused() -> None:
    with pytest.raises(ValueError, match="no decoder adapter for model_type='gpt2'"):
        describe(AutoConfig.for_model("gpt2"))
    with pytest.raises(ValueError, match="model_type='vit' is not a causal language model"):
        describe(AutoConfig.for_model("vit"))
    with pytest.raises(ValueError, match=r"loop_layers=\(0, 9\) cannot work: the base has 4 layers"):
        describe(make_base("llama").config, SleepConfig(loop_layers=(0, 9)))
