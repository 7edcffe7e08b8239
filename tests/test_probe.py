"""Bases of families that are not listed: what the probe finds, what it refuses, and what a checkpoint keeps of it."""

import json
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, HYBRIDS, MORE_FAMILIES, RELATIVES, make_base, sleep_config, tokens
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GlmForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    SmolLM3ForCausalLM,
)

from hf_sleep import SleepConfig, SleepForCausalLM, SleepLMConfig, register_base
from hf_sleep.bases import Decoder, decoder_for
from hf_sleep.bases import probe as probe_module
from hf_sleep.bases.probe import probe
from hf_sleep.bases.scales import GraniteDecoder
from hf_sleep.compat import CACHE
from hf_sleep.info import describe
from hf_sleep.registry import BASES

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TinyConfig(LlamaConfig):
    model_type = "tiny_unlisted"


class TinyForCausalLM(LlamaForCausalLM):
    """A class as code of its own would have it: Llama's body under another name."""

    config_class = TinyConfig


class TinySlidingConfig(MistralConfig):
    model_type = "tiny_unlisted_sliding"


class TinySlidingForCausalLM(MistralForCausalLM):
    config_class = TinySlidingConfig


AutoConfig.register("tiny_unlisted", TinyConfig)
AutoModelForCausalLM.register(TinyConfig, TinyForCausalLM)


def tiny(kind=TinyForCausalLM, **fields):
    torch.manual_seed(0)
    return kind(kind.config_class(**(SIZES | fields))).eval()


# What passes.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_llama_by_another_name_passes(dtype, attention):
    base = tiny(attn_implementation=attention).to(dtype)
    found = probe(base)
    assert (found.model_type, found.model_class) == ("tiny_unlisted", f"{__name__}.TinyForCausalLM")
    assert (found.dtype, found.attn_implementation) == (str(dtype).removeprefix("torch."), attention)
    assert found.lengths == [1, 6, 65]
    assert "positions from 506 to 511" in found.covered
    assert any("through a cache" in line for line in found.covered)
    assert any("pads" in line for line in found.covered)
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in HYBRIDS])
def test_every_listed_adapter_of_attention_layers_passes(family):
    assert probe(make_base(family)).covered


def test_a_listed_adapter_that_fails_is_named(monkeypatch):
    monkeypatch.setattr(GraniteDecoder, "first_input", Decoder.first_input)
    with pytest.raises(
        ValueError,
        match=r"^GraniteDecoder does not compute .* the embedding, .* override embed or first_input$",
    ):
        probe(make_base("granite"))


@pytest.mark.parametrize("window", [3, 4, 7, 300])
def test_tokens_past_a_window_are_read_whatever_its_length(window):
    """A window longer than what is read here is tried in a copy with a short one."""
    found = probe(tiny(TinySlidingForCausalLM, sliding_window=window))
    if window < 30:
        assert f"both sides of an attention window of {window} tokens" in found.covered
    else:
        copy = f"random copy (2 of 3 layers, sliding_window=8 instead of {window}): "
        assert f"{copy}both sides of an attention window of 8 tokens" in found.covered
    assert found.not_covered == ["windows of more than 201 tokens that no field of the config names"]


def test_the_base_and_the_generator_are_left_as_they_were():
    base = tiny().train()
    base.model.layers[1].eval()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config, state = base.config.to_dict(), torch.get_rng_state()
    probe(base)
    assert torch.equal(torch.get_rng_state(), state)
    assert base.config.to_dict() == config
    assert [module.training for module in base.model.layers] == [True, False, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_where_no_copy_can_be_made_the_report_says_so(monkeypatch):
    monkeypatch.setattr(probe_module, "miniature", lambda *_: (None, "it would have 1 parameters"))
    found = probe(tiny(TinySlidingForCausalLM, sliding_window=300))
    left_open = "windows of more than 65 tokens: no small copy could be made (it would have 1 parameters)"
    assert found.not_covered[-1] == left_open


def test_a_copy_of_a_large_model_is_small():
    with torch.device("meta"):
        large = MistralForCausalLM(MistralConfig())
    small, words = probe_module.miniature(large, Decoder.layer_kinds)
    assert words == "2 of 32 layers, sliding_window=8 instead of 4096"
    assert sum(parameter.numel() for parameter in small.parameters()) < 100_000
    assert (large.config.num_hidden_layers, large.config.sliding_window) == (32, 4096)


def test_rope_that_changes_with_the_length_is_left_open():
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert "keys shifted from where RoPE has other frequencies (rope_type='dynamic')" in (
        probe(tiny(rope_parameters=dynamic)).not_covered
    )


# What is refused, and where it says the difference is.


class LogitScale(TinyForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output


class EmbeddingScale(TinyForCausalLM):
    def forward(self, input_ids=None, **kwargs):
        return super().forward(inputs_embeds=self.model.embed_tokens(input_ids) * 3, **kwargs)


class NormBetween(TinyForCausalLM):
    """Its body scales what goes from one layer to the next, outside of them."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[2].register_forward_pre_hook(lambda _, args: (args[0] * 1.5, *args[1:]))


class Positions(TinyForCausalLM):
    """RoPE at twice the positions, made outside of `rotary_emb`."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        cache = kwargs.get(CACHE)
        past = 0 if cache is None else cache.get_seq_length()
        position_ids = torch.arange(past, past + input_ids.shape[1])[None] if position_ids is None else position_ids
        return super().forward(input_ids, position_ids=2 * position_ids, **kwargs)


class UndeclaredWindow(TinySlidingForCausalLM):
    """Its masks have a window of 5 tokens, of which the config that others see says nothing."""

    def forward(self, *args, **kwargs):
        self.config.sliding_window = 5
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.config.sliding_window = None


class WindowByAnotherName(TinySlidingForCausalLM):
    """A window that its config names in its own way, longer than what is read of the real weights."""

    def forward(self, *args, **kwargs):
        self.config.sliding_window = self.config.attention_window_size
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.config.sliding_window = None


class CachesBeforeRope(TinyForCausalLM):
    """A layer that rotates what it reads from its cache, and so keeps keys without positions."""

    def __init__(self, config):
        super().__init__(config)
        attention = self.model.layers[1].self_attn
        rotated = attention.forward

        def forward(hidden_states, position_embeddings=None, **kwargs):
            cos, sin = position_embeddings
            return rotated(hidden_states, position_embeddings=(torch.ones_like(cos), torch.zeros_like(sin)), **kwargs)

        attention.forward = forward


class LeavesItsCacheAlone(TinyForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        attention = self.model.layers[1].self_attn
        plain = attention.forward
        attention.forward = lambda *args, **kwargs: plain(*args, **kwargs | {CACHE: None})


class GivesTuples(TinyForCausalLM):
    """Layers as they were before transformers 5."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            plain = layer.forward
            layer.forward = lambda *args, plain=plain, **kwargs: (plain(*args, **kwargs),)

    def forward(self, input_ids=None, **kwargs):
        x = self.model.embed_tokens(input_ids)
        rope = self.model.rotary_emb(x, torch.arange(x.shape[1])[None])
        for layer in self.model.layers:
            x = layer(x, position_embeddings=rope)[0]
        return SimpleNamespace(logits=self.lm_head(self.model.norm(x)))


class ExitsEarly(TinyForCausalLM):
    def forward(self, input_ids=None, **kwargs):
        x = self.model.embed_tokens(input_ids)
        rope = self.model.rotary_emb(x, torch.arange(x.shape[1])[None])
        for layer in self.model.layers[:2]:
            x = layer(x, position_embeddings=rope)
        return SimpleNamespace(logits=self.lm_head(self.model.norm(x)))


class Extra(TinyForCausalLM):
    """A layer that adds something only where it is given the tokens' positions, as from one body alone."""

    def __init__(self, config):
        super().__init__(config)
        layer = self.model.layers[1]
        plain = layer.forward

        def forward(hidden_states, position_ids=None, **kwargs):
            made = plain(hidden_states, **kwargs)
            return made if position_ids is None else made + 0.5 * layer.mlp(layer.input_layernorm(hidden_states))

        layer.forward = forward


@pytest.mark.parametrize(
    ("kind", "fields", "place", "method"),
    [
        (LogitScale, {}, "1 tokens: the first difference is in the logits", "override logits"),
        (EmbeddingScale, {}, "1 tokens: the first difference is in the embedding", "override embed"),
        (NormBetween, {}, "in what the base does between layers 1 and 2", "override attention_layer"),
        (Positions, {}, "in RoPE's cos in layer 0", "override rope"),
        (UndeclaredWindow, {"sliding_window": None}, "6 tokens: .* in the mask of layer 0", "override own_window"),
        (
            CachesBeforeRope,
            {},
            "the keys of layer 1, shifted by -9 positions, are off",
            "override frequencies or",
        ),
        (
            WindowByAnotherName,
            {"sliding_window": None, "attention_window_size": 300},
            r"random copy \(2 of 3 layers, attention_window_size=8 instead of 300\): 23 tokens: .* the mask of layer 0",
            "override own_window",
        ),
        (LeavesItsCacheAlone, {}, rf"layer 1 called {CACHE}.update 0 times, and not once", "override attention_layer"),
        (GivesTuples, {}, "layer 0 gives a tuple, and not hidden states", "override attention_layer"),
        (ExitsEarly, {}, "the base called its 3 layers 2 times", "override attention_layer"),
        (Extra, {}, "1 tokens: the first difference is in layer 1", "override attention_layer"),
        (GlmForCausalLM, {"head_dim": 8}, "the keys of layer 0, shifted by -9 positions", "override frequencies"),
        (SmolLM3ForCausalLM, {"no_rope_layers": [1, 0, 1]}, "the keys of layer 1, shifted", "layer_kinds"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_difference_is_named_where_it_first_shows(kind, fields, place, method, monkeypatch):
    base = tiny(kind, **fields)
    monkeypatch.setattr(base.config, "model_type", "tiny_unlisted", raising=False)
    with pytest.raises(ValueError, match=place) as error:
        SleepForCausalLM.from_base(base)
    assert method in str(error.value)
    assert "register_base('tiny_unlisted')" in str(error.value)


def test_another_body_is_refused_by_what_it_lacks():
    base = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))
    with pytest.raises(
        ValueError, match=r"GPTNeoXForCausalLM is not Llama-shaped: it has no model.embed_tokens, model"
    ):
        SleepForCausalLM.from_base(base)


def test_recurrent_layers_need_an_adapter():
    base = MiniMaxForCausalLM(MiniMaxConfig(**SIZES | {"num_local_experts": 2}))
    with pytest.raises(ValueError, match="it has linear_attention layers"):
        SleepForCausalLM.from_base(base)


def test_a_base_that_does_not_repeat_itself_cannot_be_compared():
    class Noisy(TinyForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.rand(()) / 100
            return output

    with pytest.raises(ValueError, match="cannot be probed on cpu: the base does not repeat itself"):
        probe(tiny(Noisy))


# What is kept of it.


def test_the_report_is_kept_and_a_checkpoint_is_not_probed_again(tmp_path, monkeypatch):
    model = SleepForCausalLM.from_base(tiny(), sleep_config("llama", loop_layers=(0, 3)))
    assert model.config.probed == probe(model.lm).to_dict()
    ids = tokens(20)[None]
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path / "whole")
    model.lm.save_pretrained(tmp_path / "base")
    model.config.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "blocks", only_sleep=True)
    monkeypatch.setattr("hf_sleep.modeling.causal_lm.probe", lambda _: pytest.fail("probed again"))
    for name in ("whole", "blocks"):
        written = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        assert written["probed"] == model.config.probed
        assert "base_module" not in written
        loaded = SleepForCausalLM.from_pretrained(tmp_path / name)
        assert loaded.config.probed == model.config.probed
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, expected)


def test_a_listed_family_has_no_report(tmp_path):
    model = SleepForCausalLM.from_base(make_base("llama"), sleep_config("llama"))
    assert model.config.probed is None
    model.save_pretrained(tmp_path)
    assert not {"probed", "base_module"} & json.loads((tmp_path / "config.json").read_text(encoding="utf-8")).keys()


def test_without_a_report_an_unlisted_family_cannot_be_built():
    config = SleepLMConfig(text_config=TinyConfig(**SIZES), sleep=SleepConfig(window_size=8))
    with pytest.raises(ValueError, match=r"'tiny_unlisted' is not listed, and SleepLMConfig.probed holds no report"):
        SleepForCausalLM(config)


def test_what_it_would_be_is_told_without_a_probe():
    assert describe(TinyConfig(**SIZES), SleepConfig(window_size=8)).model_type == "tiny_unlisted"


# Registered from outside.


@pytest.fixture
def outside(monkeypatch):
    """A package that registers two families, as a third party's would."""
    monkeypatch.setattr(BASES, "_classes", dict(BASES._classes))
    module = types.ModuleType("third_party")
    monkeypatch.setitem(sys.modules, "third_party", module)
    return lambda kind: setattr(kind, "__module__", "third_party") or kind


def test_a_family_with_a_scale_is_registered_from_outside(outside):
    @register_base("tiny_unlisted")
    @outside
    class Scaled(Decoder):
        def logits(self, x):
            return super().logits(x) * 0.5

    model = SleepForCausalLM.from_base(tiny(LogitScale), sleep_config("llama", loop_layers=(0, 3)))
    ids = tokens(6)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny(LogitScale)(ids).logits)
    assert isinstance(model.decoder, Scaled)
    assert (model.config.probed, model.config.base_module) == (None, "third_party")
    assert probe(model.lm).covered


def test_a_checkpoint_names_the_package_that_is_not_imported(outside, tmp_path, monkeypatch):
    register_base("tiny_unlisted")(outside(type("Outside", (Decoder,), {})))
    SleepForCausalLM.from_base(tiny(), sleep_config("llama", loop_layers=(0, 3))).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["base_module"] == "third_party"
    assert SleepForCausalLM.from_pretrained(tmp_path).config.base_module == "third_party"
    monkeypatch.delitem(BASES._classes, "tiny_unlisted")
    with pytest.raises(ValueError, match=r"'tiny_unlisted': it was registered by third_party, .* import third_party"):
        SleepForCausalLM.from_pretrained(tmp_path)


def test_a_hybrid_may_name_its_layers_as_it_likes(outside):
    """Its config does not say linear_attention: the adapter does."""

    @register_base("tiny_unlisted")
    @outside
    class Hybrid(Decoder):
        recurrent_kinds = frozenset({"mine"})

        @classmethod
        def layer_kinds(cls, config):
            return ["mine", "full_attention", "mine"]

        @classmethod
        def default_loop_layers(cls, config):
            return 1, config.num_hidden_layers

        def mixer(self, index):
            return self.layers[index].self_attn

    config = TinyConfig(**SIZES)
    resolved = SleepConfig(window_size=8).resolve(config)
    assert (resolved.block_layers, resolved.loop_layers) == ((), (1, 3))
    decoder = decoder_for(tiny())
    names = decoder.fast_weight_parameters()
    assert {name.split(".")[2] for name in names} == {"0", "2"}
    assert all(".self_attn." in name for name in names)
    with pytest.raises(NotImplementedError, match=r"Hybrid names .* \(mine\) .* override empty_fast_weights"):
        decoder.empty_fast_weights(0, 1, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("family", ["qwen3_next", "olmo_hybrid", "jet_nemotron", "llama"])
def test_fast_weight_parameters_are_those_of_the_mixers(family):
    base = make_base(family)
    names = decoder_for(base).fast_weight_parameters()
    mixers = tuple(name.removesuffix("A_log") for name, _ in base.named_parameters() if name.endswith("A_log"))
    assert names == {name for name, _ in base.named_parameters() if mixers and name.startswith(mixers)}
    assert bool(names) == (family != "llama")


def test_every_listed_family_is_among_the_tests():
    assert {model_type for model_type, _ in (FAMILIES | MORE_FAMILIES | RELATIVES).values()} == set(BASES.names())
