"""The two models of the paper asleep: what is particular to them. The laws run over both in tests/test_laws.py."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from families import make_base, make_model, randomize, sleep_config, tokens
from safetensors.torch import load_file

from hf_sleep import (
    AutoModelForSleepLM,
    JetNemotronConfig,
    OuroConfig,
    SleepCache,
    SleepConfig,
    SleepForCausalLM,
    SleepLMConfig,
)
from hf_sleep.info import SlotInfo

GOLDENS = Path(__file__).parent / "goldens"


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / name / "golden.safetensors")


def on_meta(text_config, **sleep) -> SleepForCausalLM:
    with torch.device("meta"):
        return SleepForCausalLM(SleepLMConfig(text_config=text_config, sleep=SleepConfig(**sleep)))


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Jet-Nemotron.


def test_an_upstream_jet_nemotron_folder_reads_as_the_original_did():
    model = AutoModelForSleepLM.from_pretrained(GOLDENS / "jet_nemotron", sleep=SleepConfig(window_size=64))
    recorded = golden("jet_nemotron")
    with torch.no_grad():
        logits = model(recorded["short.input_ids"]).logits
    assert not model.fast_weights
    torch.testing.assert_close(logits, recorded["short.logits"], rtol=0, atol=1e-4)


def test_jet_nemotron_generates_what_the_original_did_until_its_first_sleep():
    model = AutoModelForSleepLM.from_pretrained(GOLDENS / "jet_nemotron", sleep=SleepConfig(window_size=66))
    recorded = golden("jet_nemotron")
    ids = recorded["short.input_ids"]
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 16, "eos_token_id": None}
    assert torch.equal(model.generate(ids, pad_token_id=0, **settings), recorded["generate.short"])
    early = AutoModelForSleepLM.from_pretrained(GOLDENS / "jet_nemotron", sleep=SleepConfig(window_size=50))
    assert not torch.equal(early.generate(ids, pad_token_id=0, **settings), recorded["generate.short"])


@pytest.mark.parametrize(("depth", "loop"), [(28, (7, 21)), (36, (9, 27)), (6, (1, 5))])
def test_jet_nemotron_loops_its_middle_half(depth, loop):
    types = ["jet", "attn"] * (depth // 2)
    config = JetNemotronConfig(num_hidden_layers=depth, layer_types=types)
    assert SleepConfig().resolve(config).loop_layers == loop
    assert SleepConfig(loop_layers=(0, depth)).resolve(config).loop_layers == (0, depth)


def test_the_2b_needs_no_new_parameter_to_sleep():
    model = on_meta(JetNemotronConfig())
    assert count(model) == 1_964_806_208
    roles = [SlotInfo.of(slot).role for slot in model._sleeper().order.slots]
    assert (roles.count("linear"), roles.count("attention"), len(roles)) == (24, 4, 28)


def test_jet_nemotron_writes_its_fast_weights_once_outside_the_loop():
    model, ids = (
        make_model("jet_nemotron", sleep_config("jet_nemotron", block_layers=(), loop_layers=(1, 3))),
        tokens(6),
    )
    states = {}
    for passes in (1, 3):
        cache = SleepCache()
        with torch.no_grad():
            model(ids[None], cache=cache)
            model.sleep(cache, sleep_passes=passes)
        states[passes] = [pair and pair[0] for pair in cache.memory.carried]
    assert torch.equal(states[1][0], states[3][0])
    assert not torch.equal(states[1][2], states[3][2])


def test_a_sleeping_jet_nemotron_keeps_its_upstream_form_inside(tmp_path):
    model = AutoModelForSleepLM.from_pretrained(GOLDENS / "jet_nemotron", sleep=SleepConfig(window_size=16))
    model.save_pretrained(tmp_path)
    upstream = json.loads((GOLDENS / "jet_nemotron" / "config.json").read_text(encoding="utf-8"))
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["text_config"]
    for key in ("model_type", "layer_types", "efficient_attention_config", "rope_theta", "tie_word_embeddings"):
        assert written[key] == upstream[key]
    again, ids = AutoModelForSleepLM.from_pretrained(tmp_path), tokens(40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


# Ouro.


def test_an_upstream_ouro_folder_reads_as_the_original_did_with_one_loop():
    model = AutoModelForSleepLM.from_pretrained(GOLDENS / "ouro", sleep=SleepConfig(window_size=64, sleep_passes=4))
    recorded = golden("ouro")
    assert model.lm.config.total_ut_steps == 3
    with torch.no_grad():
        logits = model(recorded["input_ids"]).logits
    torch.testing.assert_close(logits, recorded["logits_per_step"][0], rtol=0, atol=1e-4)


def test_wake_is_one_loop_whatever_total_ut_steps_says():
    sleep = sleep_config("ouro", window_size=16, sleep_passes=3)
    base, ids = make_base("ouro"), tokens(16)[None]
    with torch.no_grad():
        one_loop = base(ids).logits
        base.config.total_ut_steps = 4
        assert not torch.allclose(base(ids).logits, one_loop)
        assert torch.equal(SleepForCausalLM.from_base(base, sleep)(ids).logits, one_loop)


@pytest.mark.parametrize(("loop", "norms"), [((0, 4), 1 + 3), ((1, 4), 1 + 3), ((1, 3), 1 + 1)])
def test_the_norm_closes_every_pass_that_reaches_the_last_layer(loop, norms):
    """One read, then a sleep of N = 4: three more passes; where the loop ends before, the layers after it once."""
    # Sliding, where what the last pass makes is wanted.
    model, cache = make_model("ouro", sleep_config("ouro", loop_layers=loop, eviction="sliding")), SleepCache()
    with mock.patch.object(model.lm.model.norm, "forward", wraps=model.lm.model.norm.forward) as norm, torch.no_grad():
        model(tokens(6)[None], cache=cache)
        model.sleep(cache, sleep_passes=4)
    assert norm.call_count == norms


def test_training_leaves_the_exit_gate_untouched(tmp_path):
    model = make_model("ouro", sleep_config("ouro")).train()
    before = {name: t.clone() for name, t in model.lm.model.early_exit_gate.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(tokens(20)[None], labels=tokens(20)[None]).loss.backward()
    optimizer.step()
    missing = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert missing == {"lm.model.early_exit_gate.weight", "lm.model.early_exit_gate.bias"}
    model.save_pretrained(tmp_path)
    gate = SleepForCausalLM.from_pretrained(tmp_path).lm.model.early_exit_gate
    assert all(torch.equal(t, before[name]) for name, t in gate.state_dict().items())


@pytest.mark.parametrize(
    ("sleep", "added", "share"),
    [({}, 69_963_324, 0.0488), ({"block_num_heads": 12, "block_head_dim": 96}, 133_074_192, 0.0928)],
)
def test_six_jet_blocks_add_less_than_a_tenth_to_the_1_4b(sleep, added, share):
    file = GOLDENS / "ouro" / "upstream_configs" / "config_1.4B.json"
    model = on_meta(OuroConfig.from_dict(json.loads(file.read_text(encoding="utf-8"))), **sleep)
    assert model.config.sleep.block_layers == (2, 6, 10, 14, 18, 22)
    assert model.config.sleep.loop_layers == (0, 24)
    assert (count(model.lm), count(model.fast_weights)) == (1_434_652_673, added)
    assert added / count(model.lm) == pytest.approx(share, abs=5e-5)


def test_a_looped_ouro_stays_finite_through_many_passes():
    """The norm after every pass bounds h, so that even forty passes over an untrained model explode nothing."""
    model = make_model("ouro", sleep_config("ouro", sleep_passes=40))
    randomize(model.fast_weights, 3)
    cache = SleepCache()
    with torch.no_grad():
        logits = model(tokens(20)[None], cache=cache).logits
    assert logits.isfinite().all()
    assert all(pair[0].abs().max() < 1e3 for pair in cache.memory.carried if pair)
