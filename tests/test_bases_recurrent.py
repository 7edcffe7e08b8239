"""Bases whose own recurrent layers are Mamba2 or Kimi Delta Attention: what the laws of every family leave out."""

import pytest
import torch
from families import RELATIVES, exact, make_base, make_model, sleep_config, tokens
from helpers import L, T, assert_close, assert_loss_and_gradients, assert_same_states, sleeper, states, stream
from reference import reference_run
from transformers import AutoConfig

from hf_sleep import SleepConfig, SleepForCausalLM
from hf_sleep.bases import decoder_for
from hf_sleep.info import describe

OURS = ("granitemoehybrid", "kimi_linear", *RELATIVES)
CASES = [f"{family}/{rest}" for family in RELATIVES for rest in ("hard+sink/N3/all", "sliding+sink/N2/1-3")]


@pytest.mark.parametrize("family", RELATIVES)
def test_an_untrained_relative_is_the_base_to_rounding(family):
    sleep, ids = sleep_config(family, window_size=80, sleep_passes=3), tokens(70)[None]
    with torch.no_grad(), exact():
        model, base = make_model(family, sleep, torch.double, trained=False), make_base(family, torch.double)
        assert_close(model(ids).logits, base(ids).logits, 1e-11)


@pytest.mark.parametrize("case", CASES)
def test_a_relative_runs_algorithm_1(case):
    model, ids = sleeper(case), tokens(T)
    with exact(), torch.no_grad():
        run = reference_run(model, ids)
        for sizes in ([T], [1] * T, [L + 3, 1, T - L - 4]):
            logits, cache = stream(model, ids[None], sizes)
            assert_close(logits[0], run.logits, what=f"logits of {sizes}")
            assert_same_states(states(model, cache), run.memory)
    with exact():
        assert_loss_and_gradients(case, model, 1e-9)


def test_the_time_step_is_clamped_at_both_ends():
    base = make_base("granitemoehybrid")
    mixer, steps = base.model.layers[0].mamba, []
    mixer.in_proj.register_forward_hook(lambda *call: steps.append(call[2][..., -mixer.num_heads :]))
    base(tokens(200)[None])
    dt = torch.nn.functional.softplus(steps[0] + mixer.dt_bias)
    low, high = mixer.time_step_limit
    assert (dt < low).float().mean() > 0.05
    assert (dt > high).float().mean() > 0.05


@pytest.mark.parametrize("name", ["mamba", "attention"])
def test_published_names_of_layers_are_understood(name):
    kinds = ["mamba", name, "mamba"]
    config = AutoConfig.for_model("granitemoehybrid", layer_types=kinds, num_hidden_layers=3)
    sleep = SleepConfig(window_size=64).resolve(config)
    assert sleep.block_layers == ()
    assert config.layer_types[::2] == ["linear_attention"] * 2


@pytest.mark.parametrize("family", OURS)
def test_fast_weight_parameters_are_the_mixers(family):
    decoder = decoder_for(make_base(family))
    own = decoder.fast_weight_parameters()
    mixer = "self_attn" if family.startswith("kimi") else "mamba"
    assert own == {
        name
        for name, _ in decoder.lm.named_parameters()
        if name.startswith((f"model.layers.0.{mixer}.", f"model.layers.2.{mixer}."))
    }
    assert {name.rsplit(".", 1)[-1] for name in own} >= {"A_log", "dt_bias", "weight"}


@pytest.mark.parametrize("family", OURS)
def test_in_16_bits_states_and_gates_stay_fp32(family, tmp_path):
    model = make_model(family, sleep_config(family, window_size=L, sleep_passes=2))
    model.save_pretrained(tmp_path)
    loaded = SleepForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for low in (loaded, model.bfloat16()):
        gates = {name: p.dtype for name, p in low.named_parameters() if name.endswith(("A_log", "dt_bias"))}
        assert set(gates.values()) == {torch.float32}
        assert len(gates) == 6
        with torch.no_grad():
            out = low(tokens(T)[None], use_cache=True)
        assert out.logits.dtype == torch.bfloat16
        assert out.logits.isfinite().all()
        assert {S.dtype for S, _ in states(low, out.cache).values()} == {torch.float32}
        assert {tail.dtype for _, tail in states(low, out.cache).values()} == {torch.bfloat16}


@pytest.mark.parametrize("family", OURS)
def test_eager_attention_is_sdpa_s(family):
    sleep = sleep_config(family, window_size=L, eviction="sliding", num_sink_tokens=2)
    with exact(), torch.no_grad():
        base = make_base(family, torch.double)
        base.set_attn_implementation("eager")
        model = SleepForCausalLM.from_base(base, sleep).double()
        expected = make_model(family, sleep, torch.double, trained=False)
        assert_close(model(tokens(T)[None]).logits, expected(tokens(T)[None]).logits)


def test_a_gate_that_is_wide_open_has_a_gradient():
    """transformers' softplus is NaN there in the backward."""
    model = make_model("kimi_linear", sleep_config("kimi_linear", window_size=L))
    gate = model.lm.model.layers[0].self_attn.forget_gate
    gate.dt_bias.data.fill_(100.0)
    model.train()(tokens(T)[None], labels=tokens(T)[None]).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_published_sizes_are_described():
    granite = AutoConfig.for_model(
        "granitemoehybrid",
        hidden_size=1536,
        intermediate_size=512,
        shared_intermediate_size=1024,
        num_hidden_layers=40,
        layer_types=["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)],
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=100352,
        num_local_experts=64,
        num_experts_per_tok=6,
        mamba_n_heads=48,
        mamba_d_state=128,
        mamba_d_head=64,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
    )
    info = describe(granite, dtype=torch.bfloat16)
    assert info.parameters == pytest.approx(6.9e9, rel=0.02)
    assert info.layer_kinds == {"linear_attention": 36, "full_attention": 4}
    assert info.fast_weight_bytes == 36 * (48 * 128 * 64 * 4 + (2 * 1536 + 2 * 128) * 4 * 2)
    assert info.kv_bytes_per_token == 4 * 2 * 4 * 128 * 2
    info = describe(AutoConfig.for_model("kimi_linear"), dtype=torch.bfloat16)
    assert info.parameters == pytest.approx(49e9, rel=0.02)
    assert info.layer_kinds == {"linear_attention": 21, "full_attention": 6}
    assert info.fast_weight_bytes == 21 * (32 * 128 * 128 * 4 + 3 * 32 * 128 * 4 * 2)
    assert info.kv_bytes_per_token == 6 * (512 + 64) * 2


@pytest.mark.parametrize("family", OURS)
def test_an_untrained_retrofit_generates_what_the_base_generates(family):
    model, base = make_model(family, sleep_config(family, window_size=64), trained=False), make_base(family)
    ids, settings = tokens(9)[None], {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    # Without its cache: through it, a step of transformers' Mamba2 layers leaves the clamp of the time step out.
    assert torch.equal(model.generate(ids, **settings), base.generate(ids, use_cache=False, **settings))
