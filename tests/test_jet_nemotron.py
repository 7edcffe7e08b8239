"""Jet-Nemotron against what its own code computed, and as a model among others."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import answers_to_both_names
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_sleep import SleepConfig, SleepLMConfig
from hf_sleep.bases import JetNemotronConfig, JetNemotronForCausalLM, JetNemotronModel
from hf_sleep.bases.jet_nemotron import JetNemotronDecoder
from hf_sleep.compat import CHECKPOINTING
from hf_sleep.layers import Jet
from hf_sleep.ops import dynamic_short_convolution, gated_delta_rule

FOLDER = Path(__file__).parent / "goldens" / "jet_nemotron"
UPSTREAM = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
WINDOW = 20
JET_LAYERS = (0, 2, 4)

# What the published configs hold, where they differ from the class's defaults or from each other.
CONFIG_2B = {
    "num_hidden_layers": 28,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "max_position_embeddings": 131072,
    "layer_types": ["swa" if i in (20, 21) else "attn" if i in (14, 19) else "jet" for i in range(28)],
    "efficient_attention_config": {
        "jet": UPSTREAM["efficient_attention_config"]["jet"] | {"num_heads": 12, "head_dim": 96},
        "swa": {"window_size": 1152},
    },
}
CONFIG_4B = {
    "num_hidden_layers": 36,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "max_position_embeddings": 32768,
    "layer_types": [
        "swa" if i in (5, 16, 19, 21, 22, 25, 27) else "attn" if i in (17, 20, 32) else "jet" for i in range(36)
    ],
    "efficient_attention_config": {
        "jet": UPSTREAM["efficient_attention_config"]["jet"] | {"num_heads": 16, "head_dim": 128, "expand_v": 2},
        "swa": {"window_size": 2048},
    },
}
PUBLISHED = {"vocab_size": 151936, "num_key_value_heads": 2, "bos_token_id": 151643, "eos_token_id": 151643}


@pytest.fixture(scope="module")
def golden():
    return load_file(FOLDER / "golden.safetensors")


@pytest.fixture(scope="module")
def shared():
    return JetNemotronForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture
def model(shared):
    """One to train and to change."""
    return copy.deepcopy(shared)


def close(actual, expected, atol=5e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def check_states(cache, golden, name, real=None, atol=2e-5):
    """Compare a cache with the golden states, keys and values at `real` tokens `[B, T]` only."""
    for i, layer in enumerate(cache.layers):
        if i in JET_LAYERS:
            assert layer.recurrent_states[0].dtype == torch.float32
            close(layer.recurrent_states[0], golden[f"{name}.state.{i}.recurrent"], atol)
            close(layer.conv_states[0], golden[f"{name}.state.{i}.conv"], atol)
            continue
        held = layer.keys.shape[2]
        assert held == (cache.get_seq_length() if i == 1 else WINDOW - 1)
        for mine, kind in ((layer.keys, "key"), (layer.values, "value")):
            wanted = golden[f"{name}.state.{i}.{kind}"][:, :, -held:]
            if real is not None:
                mine, wanted = (x.transpose(1, 2)[real[:, -held:]] for x in (mine, wanted))
            close(mine, wanted, atol)


def continued(model, ids, sizes, cache=None, mask=None, **kwargs):
    """Logits of `ids` read in pieces of these sizes, and the cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    past, logits = cache.get_seq_length(), []
    for piece in ids.split(sizes, dim=1):
        past += piece.shape[1]
        seen = None if mask is None else mask[:, :past]
        logits.append(model(piece, attention_mask=seen, cache=cache, use_cache=True, **kwargs).logits)
    return torch.cat(logits, dim=1), cache


# Against the reference.


@pytest.mark.parametrize("name", ["short", "long"])
@torch.no_grad()
def test_forward_is_the_references(shared, golden, name):
    before_norm = []
    hook = shared.model.norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    output = shared(golden[f"{name}.input_ids"], use_cache=True, output_hidden_states=True)
    hook.remove()
    close(output.logits, golden[f"{name}.logits"])
    assert len(output.hidden_states) == 7
    for i, hidden in enumerate(output.hidden_states):
        wanted = golden[f"{name}.hidden.{i}"]
        close(hidden[:, -wanted.shape[1] :], wanted)
    wanted = golden[f"{name}.hidden.last_prenorm"]
    close(before_norm[0][:, -wanted.shape[1] :], wanted)
    check_states(output.cache, golden, name)


@pytest.mark.parametrize("name", ["short", "long"])
@torch.no_grad()
def test_token_by_token_is_the_references(shared, golden, name):
    ids = golden[f"{name}.input_ids"]
    prefill = int(golden[f"{name}.decode.prefill_len"])
    assert prefill < ids.shape[1]
    logits, cache = continued(shared, ids, [prefill] + [1] * (ids.shape[1] - prefill))
    close(logits, golden[f"{name}.logits"])
    check_states(cache, golden, name)


@torch.no_grad()
def test_a_padded_batch_is_the_references(shared, golden):
    ids, mask = golden["padded.input_ids"], golden["padded.attention_mask"]
    real = mask.bool()
    positions = golden["padded.position_ids"]
    output = shared(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    close(output.logits[real], golden["padded.logits"][real])
    cache = output.cache
    prefilled = golden | {
        f"padded.state.1.{kind}": golden[f"padded.decode.state.1.{kind}"][:, :, :50] for kind in ("key", "value")
    }
    check_states(cache, prefilled, "padded", real)
    more = golden["padded.decode_ids"]
    mask = torch.cat([mask, torch.ones_like(more)], dim=1)
    logits, cache = continued(shared, more, 1, cache, mask)
    close(logits, golden["padded.decode_logits"])
    check_states(cache, golden, "padded.decode", mask.bool())


@pytest.mark.parametrize("name", ["short", "long", "padded"])
def test_generate_is_the_references(shared, golden, name):
    wanted = golden[f"generate.{name}"]
    ids = golden[f"{name}.input_ids"][:, : wanted.shape[1] - 16]
    mask = golden["padded.attention_mask"] if name == "padded" else torch.ones_like(ids)
    made = shared.generate(
        ids, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(made, wanted)


@torch.no_grad()
def test_inside_the_mixer_all_is_the_references(shared, golden):
    def parts(mixer, x):
        made = {name: getattr(mixer, f"{name}_proj")(x) for name in "qkvbg"}
        taps = mixer.dynamic_conv1d.kernel_generator(x)
        v = F.silu(dynamic_short_convolution(made["v"], taps)[0])
        heads = {name: F.silu(made[name]).unflatten(-1, (3, 24)) for name in "qk"}
        return made, taps, v, heads, mixer.decay(x), made["b"].sigmoid()

    mixer, x = shared.model.layers[0].self_attn, golden["block0.input"]
    made, taps, v, heads, g, beta = parts(mixer, x)
    o, state = gated_delta_rule(heads["q"], heads["k"], v.unflatten(-1, (3, 64)), g, beta)
    gate = made["g"].unflatten(-1, (3, 64))
    wanted = {"v_in": made["v"], "v_out": v, "gate": gate, "delta_out": o, "normed": mixer.o_norm(o, gate)}
    for name, value in wanted.items():
        close(value, golden[f"block0.{name}"], 2e-5)
    close(taps[:, :16], golden["block0.kernels"], 1e-5)
    mixed, (recurrent_state, _) = mixer(x, mixer.empty(1, x.device, x.dtype))
    close(mixed, golden["block0.output"], 1e-5)
    close(recurrent_state, state, 1e-6)
    close(recurrent_state, golden["short.state.0.recurrent"][:1], 1e-5)

    layer = shared.model.layers[4]
    _, _, v, heads, g, beta = parts(layer.self_attn, layer.input_layernorm(golden["short.hidden.4"][:1]))
    for name, value in (heads | {"v": v.unflatten(-1, (3, 64)), "g": g, "beta": beta}).items():
        close(value, golden[f"block4.{name}"], 2e-5)


def test_loss_and_gradients_are_the_references(model, golden):
    model.train()
    ids = golden["long.input_ids"]
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    close(loss.detach(), golden["train.loss"], 1e-5)
    parameters = dict(model.named_parameters())
    names = [name.removeprefix("train.grad.") for name in golden if name.startswith("train.grad.")]
    assert len(names) == 21
    for name in names:
        wanted = golden[f"train.grad.{name}"]
        close(parameters[name].grad, wanted, 5e-5 * float(wanted.abs().max()))


@torch.no_grad()
def test_every_length_is_a_prefix_of_the_long_one(shared, golden):
    ids, logits = golden["long.input_ids"], golden["long.logits"]
    for tokens in (1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65):
        close(shared(ids[:, :tokens]).logits, logits[:, :tokens])


def test_every_length_can_be_trained_on(model, golden):
    model.train()
    for tokens in (1, 2, 3, 4, 16, 17, 63, 64):
        model.zero_grad()
        model(golden["long.input_ids"][:, :tokens], use_cache=False).logits.square().mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.isfinite().all(), (tokens, name)
        generator = model.model.layers[0].self_attn.dynamic_conv1d.kernel_generator
        assert generator.w1.weight.grad.abs().max() > 0


# The checkpoint's form.


@pytest.mark.parametrize(("fields", "count"), [(CONFIG_2B, 1_964_806_208), (CONFIG_4B, 3_960_424_768)])
def test_parameter_counts_are_the_published_ones(fields, count):
    config = JetNemotronConfig.from_dict(UPSTREAM | PUBLISHED | fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == count


def test_names_and_shapes_are_the_2b_checkpoints():
    with torch.device("meta"):
        model = JetNemotronForCausalLM(JetNemotronConfig())
    shapes = {"model.embed_tokens.weight": (151936, 1536), "model.norm.weight": (1536,)}
    for i, kind in enumerate(CONFIG_2B["layer_types"]):
        parts = {"input_layernorm.weight": (1536,), "post_attention_layernorm.weight": (1536,)}
        parts |= {f"mlp.{name}_proj.weight": (8960, 1536) for name in ("gate", "up")}
        parts |= {"mlp.down_proj.weight": (1536, 8960)}
        if kind == "jet":
            parts |= {"self_attn.A_log": (12,), "self_attn.dt_bias": (12,)}
            parts |= {f"self_attn.{name}_proj.weight": (1152, 1536) for name in "qk"}
            parts |= {f"self_attn.{name}_proj.weight": (3072, 1536) for name in "vg"}
            parts |= {f"self_attn.{name}_proj.weight": (12, 1536) for name in "ab"}
            parts |= {"self_attn.o_norm.weight": (256,), "self_attn.o_proj.weight": (1536, 3072)}
            generator = "self_attn.dynamic_conv1d.kernel_generator."
            parts |= {generator + "w1.weight": (384, 1536), generator + "w2.weight": (12288, 384)}
            parts |= {generator + "w2.bias": (12288,)}
        else:
            parts |= {"self_attn.q_proj.weight": (1536, 1536), "self_attn.q_proj.bias": (1536,)}
            parts |= {f"self_attn.{name}_proj.weight": (256, 1536) for name in "kv"}
            parts |= {f"self_attn.{name}_proj.bias": (256,) for name in "kv"}
            parts |= {"self_attn.o_proj.weight": (1536, 1536)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in parts.items()}
    assert len(shapes) == 482
    assert {name: tuple(value.shape) for name, value in model.named_parameters()} == shapes
    assert set(model.state_dict()) == set(shapes) | {"lm_head.weight"}


def test_the_defaults_are_the_2b_models():
    given = JetNemotronConfig(**(UPSTREAM | PUBLISHED | CONFIG_2B)).to_dict()
    default = JetNemotronConfig().to_dict()
    assert {key: default[key] for key in CONFIG_2B if key != "efficient_attention_config"} == {
        key: given[key] for key in CONFIG_2B if key != "efficient_attention_config"
    }
    assert {key: default[key] for key in PUBLISHED} == PUBLISHED
    assert default["efficient_attention_config"]["swa"] == {"window_size": 1152}
    jet = default["efficient_attention_config"]["jet"] | {"norm_eps": "1e-5"}
    assert jet.keys() >= {"conv_size", "dconv_generator_reduction"}
    assert jet.items() <= CONFIG_2B["efficient_attention_config"]["jet"].items()
    assert (default["rope_theta"], default["tie_word_embeddings"]) == (1e6, True)


def test_the_upstream_config_comes_back(tmp_path):
    config = AutoConfig.from_pretrained(FOLDER)
    assert isinstance(config, JetNemotronConfig)
    assert config.layer_types == [
        "linear_attention",
        "full_attention",
        "linear_attention",
        "sliding_attention",
        "linear_attention",
        "sliding_attention",
    ]
    assert (config.sliding_window, config.head_dim) == (WINDOW, 16)
    assert JetNemotronDecoder.default_loop_layers(config) == (1, 5)
    assert config.dtype == torch.float32
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["transformers_version"] != UPSTREAM["transformers_version"]
    assert written == UPSTREAM | {"transformers_version": written["transformers_version"], "pad_token_id": None}
    assert config.to_dict().items() >= written.items()
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == config.to_dict() | {"_name_or_path": str(tmp_path)}


def test_a_config_survives_every_way_of_copying():
    config = JetNemotronConfig.from_pretrained(FOLDER)
    config.something_unknown = {"kept": [1]}
    plain = config.to_dict()
    assert plain["something_unknown"] == {"kept": [1]}
    for again in (
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        JetNemotronConfig(**plain),
        JetNemotronConfig.from_dict(plain),
        CONFIG_MAPPING["jet_nemotron"](**{key: value for key, value in plain.items() if key != "model_type"}),
        SleepLMConfig(text_config=config, sleep=SleepConfig(window_size=8)).text_config,
        SleepLMConfig(**SleepLMConfig(text_config=config, sleep=SleepConfig(window_size=8)).to_dict()).text_config,
    ):
        found = again.to_dict()
        assert found.pop("transformers_version") == plain["transformers_version"] or again is not config
        assert found == {key: value for key, value in plain.items() if key != "transformers_version"}
        assert again.layer_types == config.layer_types
        assert again.rope_parameters == config.rope_parameters == {"rope_theta": 1e6, "rope_type": "default"}
    assert config.to_dict() == plain


@pytest.mark.parametrize(
    "text", ["jet,attn,swa", "jet, attn, swa", "['jet', 'attn', 'swa']", '["jet", "attn", "swa"]', "[jet, attn, swa]"]
)
def test_layer_types_may_be_a_string(text):
    config = JetNemotronConfig(num_hidden_layers=3, layer_types=text)
    assert config.layer_types == ["linear_attention", "full_attention", "sliding_attention"]
    assert config.to_dict()["layer_types"] == ["jet", "attn", "swa"]


def test_scaled_rope_keeps_its_upstream_form():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    config = JetNemotronConfig(rope_theta=5e5, rope_scaling=dict(yarn))
    assert config.rope_parameters == yarn | {"rope_theta": 5e5}
    plain = config.to_dict()
    assert (plain["rope_scaling"], plain["rope_theta"]) == (yarn, 5e5)
    assert JetNemotronConfig(**plain).rope_parameters == config.rope_parameters


def test_without_sliding_layers_there_is_no_window():
    fields = {"num_hidden_layers": 2, "layer_types": ["jet", "attn"]}
    config = JetNemotronConfig(**fields)
    assert config.sliding_window is None
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 7, "eos_token_id": None}
    jet = {"num_heads": 1, "head_dim": 4, "expand_v": 2}
    config = JetNemotronConfig(**fields, **tiny, bos_token_id=None, efficient_attention_config={"jet": jet})
    assert config.sliding_window is None
    made = JetNemotronForCausalLM(config).generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 6)


def test_qwen2s_leftovers_do_no_harm():
    config = JetNemotronConfig(head_dim=128, sliding_window=131072, use_sliding_window=False)
    assert (config.head_dim, config.sliding_window) == (128, 1152)


def jet_with(**fields):
    return {"efficient_attention_config": {"jet": {"num_heads": 2, "head_dim": 96, "expand_v": 2} | fields}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["jet", "gdn", "attn", "swa"]}, "layer_types='gdn' .* must be one of jet, attn, swa"),
        ({"layer_types": ["jet", "attn"]}, "layer_types=.* it names 2 layers, num_hidden_layers is 4"),
        ({"layer_types": None}, "layer_types=.* it names 28 layers, num_hidden_layers is 4"),
        ({"layer_types": ["jet"] * 4}, "layer_types=.* at least one layer must be attn or swa"),
        ({"num_attention_heads": 7}, "num_attention_heads=7 .* it must divide hidden_size=1536"),
        ({"head_dim": 64}, "head_dim=64 .* it is hidden_size / num_attention_heads = 128"),
        (jet_with(expand_v=2.3), "jet.expand_v=2.3 .* times head_dim=96 it must be a whole number"),
        (jet_with(expand_v=None), "jet.expand_v=None .* times head_dim=96 it must be a whole number"),
        (jet_with(num_heads=0), "jet.num_heads=0 .* a whole number of at least 1"),
        (jet_with(head_dim=1.5), "jet.head_dim=1.5 .* a whole number of at least 1"),
        (jet_with(conv_size="4"), "jet.conv_size='4' .* a whole number of at least 1"),
        ({"efficient_attention_config": {"swa": {"window_size": 8}}}, "jet.num_heads=None .* a whole number"),
        (jet_with(), "swa.window_size=None .* at least 2"),
        (jet_with() | {"layer_types": ["swa", "attn", "attn", "attn"]}, "swa.window_size=None .* at least 2"),
        (
            {"efficient_attention_config": jet_with()["efficient_attention_config"] | {"swa": {"window_size": 1}}},
            "swa.window_size=1 .* at least 2",
        ),
    ],
)
def test_a_config_that_cannot_work_says_what_would(fields, message):
    usual = {"num_hidden_layers": 4, "layer_types": ["jet", "attn", "jet", "swa"]}
    with pytest.raises(ValueError, match=rf"^JetNemotronConfig\.(efficient_attention_config\.)?{message}"):
        JetNemotronConfig(**(usual | fields))


def test_a_config_may_be_overridden_where_it_is_loaded():
    kinds = ["jet", "jet", "attn", "swa", "jet", "swa"]
    assert AutoConfig.from_pretrained(FOLDER, layer_types=kinds).layer_types[:3] == ["linear_attention"] * 2 + [
        "full_attention"
    ]
    with pytest.raises(ValueError, match=r"JetNemotronConfig.sliding_window=5 .* swa.window_size"):
        AutoConfig.from_pretrained(FOLDER, sliding_window=5)
    with pytest.raises(ValueError, match=r"JetNemotronConfig.head_dim=8 .* hidden_size / num_attention_heads"):
        AutoConfig.from_pretrained(FOLDER, head_dim=8)


def test_weights_come_back_bit_for_bit(shared, tmp_path):
    shared.save_pretrained(tmp_path)
    given, written = load_file(FOLDER / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert given.keys() == written.keys()
    assert all(torch.equal(given[name], written[name]) for name in given)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, JetNemotronForCausalLM)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    headless = AutoModel.from_pretrained(tmp_path)
    assert isinstance(headless, JetNemotronModel)
    assert torch.equal(headless.layers[2].self_attn.A_log, shared.model.layers[2].self_attn.A_log)


# Fresh weights.


def is_fresh(jet, std):
    taps = jet.dynamic_conv1d.kernel_generator.w2.bias.view(-1, 4)
    assert torch.equal(taps, torch.tensor([0.0, 0.0, 0.0, 1.0]).expand_as(taps))
    assert torch.equal(jet.o_norm.weight, torch.ones(64))
    assert -9.3 < jet.A_log.min() <= jet.A_log.max() < 2.8
    step = F.softplus(jet.dt_bias)
    assert 0.99e-3 < step.min() <= step.max() < 0.101
    for name in "qkvabg":
        weight = getattr(jet, f"{name}_proj").weight
        assert weight.std().item() == pytest.approx(std, rel=0.4 if weight.numel() < 1000 else 0.1)


def test_fresh_weights_are_all_initialised_and_learn(golden):
    set_seed(1)
    config = JetNemotronConfig.from_pretrained(FOLDER)
    config.initializer_range = 0.05
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    for i in JET_LAYERS:
        is_fresh(model.model.layers[i].self_attn, 0.05)
    assert model.model.layers[1].self_attn.k_proj.weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert torch.equal(model.model.norm.weight, torch.ones(64))
    ids = golden["short.input_ids"]
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_missing_weights_are_made_and_loaded_ones_kept(tmp_path):
    weights = load_file(FOLDER / "model.safetensors")
    prefix = "model.layers.2.self_attn."
    missing = {f"{prefix}{name}" for name in ("A_log", "dynamic_conv1d.kernel_generator.w2.bias")}
    missing |= {name for name in weights if name.startswith("model.layers.4.self_attn.")}
    save_file({k: v for k, v in weights.items() if k not in missing}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((FOLDER / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    model, report = JetNemotronForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == missing
    is_fresh(model.model.layers[4].self_attn, 0.02)
    taps = model.model.layers[2].self_attn.dynamic_conv1d.kernel_generator.w2.bias.view(-1, 4)
    assert torch.equal(taps.sum(0), torch.tensor([0.0, 0.0, 0.0, 192.0]))
    made = dict(model.named_parameters())
    assert all(torch.equal(made[name], weights[name]) for name in weights.keys() - missing)


def test_the_linear_init_does_not_undo_the_mixers():
    model = JetNemotronForCausalLM(JetNemotronConfig.from_pretrained(FOLDER))
    jet = model.model.layers[0].self_attn
    for module in jet.modules():
        module._is_hf_initialized = False
    model._initialize_weights(jet)
    for module in jet.modules():
        model._initialize_weights(module)
    is_fresh(jet, 0.02)


# Caches.


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 49])
@torch.no_grad()
def test_prefill_in_chunks_is_prefill_at_once(shared, golden, chunk):
    ids, mask = golden["padded.input_ids"], golden["padded.attention_mask"]
    logits, cache = continued(shared, ids, chunk, mask=mask)
    real = mask.bool()
    close(logits[real], golden["padded.logits"][real])
    for i in JET_LAYERS:
        close(cache.layers[i].recurrent_states[0], golden[f"padded.state.{i}.recurrent"], 2e-5)
        close(cache.layers[i].conv_states[0], golden[f"padded.state.{i}.conv"], 2e-5)


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_generate_prefills_in_chunks(shared, golden, chunk):
    made = shared.generate(
        golden["padded.input_ids"],
        attention_mask=golden["padded.attention_mask"],
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        prefill_chunk_size=chunk,
    )
    assert torch.equal(made, golden["generate.padded"])


def test_beams_are_those_of_recomputation(shared, golden):
    options = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = {"input_ids": golden["padded.input_ids"], "attention_mask": golden["padded.attention_mask"]}
    cached = shared.generate(**prompt, **options)
    assert torch.equal(cached, shared.generate(**prompt, **options, use_cache=False))
    assert not torch.equal(cached, shared.generate(**prompt, **(options | {"num_beams": 1})))


def test_generate_with_a_static_cache_is_the_references(shared, golden):
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "cache_implementation": "static"}
    for name in ("short", "padded"):
        prompt = {"attention_mask": golden["padded.attention_mask"]} if name == "padded" else {}
        made = shared.generate(golden[f"{name}.input_ids"], **prompt, max_new_tokens=16, **options)
        assert torch.equal(made, golden[f"generate.{name}"])


def test_a_conversation_goes_on_from_the_returned_cache(shared, golden):
    ids = golden["short.input_ids"]
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    first = shared.generate(ids[:, :30], max_new_tokens=5, **options)
    prompt = torch.cat([first.sequences, ids[:, 30:33]], dim=1)
    second = shared.generate(prompt, cache=first.cache, max_new_tokens=8, **options)
    assert torch.equal(second.sequences, shared.generate(prompt, max_new_tokens=8, **options).sequences)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@torch.no_grad()
def test_pads_are_as_if_they_were_not_there(shared, golden, side):
    ids = golden["short.input_ids"][:, :14]
    alone = shared(ids[:1]).logits
    places = {"left": range(6, 20), "right": range(14), "holes": [0, 1, 4, 5, 6, 8, 9, 10, 13, 14, 15, 16, 18, 19]}
    row, mask = torch.full((1, 20), 77), torch.zeros(1, 20, dtype=torch.long)
    row[0, list(places[side])], mask[0, list(places[side])] = ids[0], 1
    other = golden["long.input_ids"][:, :20]
    batch = shared(torch.cat([row, other]), attention_mask=torch.cat([mask, torch.ones_like(other)])).logits
    close(batch[:1][mask.bool()], alone[0])
    close(batch[1:], golden["long.logits"][:, :20])


@pytest.mark.parametrize("cut", [1, 2, 5, 8])
@torch.no_grad()
def test_pads_in_a_second_turn_are_as_if_they_were_not_there(shared, golden, cut):
    """Two turns, the first padded on the right, the second on the left, in which row 1 has nothing to say at times."""
    ids = golden["short.input_ids"][:1, :12]
    wanted = shared(ids).logits[0]
    pad = torch.full((1, 2), 77)
    row = torch.cat([ids[:, :cut], pad, pad, ids[:, cut:]], dim=1)
    mask = torch.ones(1, 16, dtype=torch.long)
    mask[:, cut : cut + 4] = 0
    other = golden["long.input_ids"][:, :16]
    both, masks = torch.cat([row, other]), torch.cat([mask, torch.ones_like(mask)])
    for sizes in ([cut + 2, 14 - cut], [1] * 16):
        logits, _ = continued(shared, both, sizes, mask=masks)
        close(logits[0][mask[0].bool()], wanted)
        close(logits[1:], golden["long.logits"][:, :16])


def test_a_mask_of_ones_moves_nothing(shared, golden, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("nothing is padded, so nothing must be moved")

    ids = golden["short.input_ids"]
    monkeypatch.setattr(torch.Tensor, "take_along_dim", refuse)
    with torch.no_grad():
        close(shared(ids, attention_mask=torch.ones_like(ids)).logits, golden["short.logits"])
        mask = golden["padded.attention_mask"]
        with pytest.raises(AssertionError, match="nothing must be moved"):
            shared(ids, attention_mask=mask)


def attended(module: torch.nn.Module, x: torch.Tensor, see) -> torch.Tensor:
    """Attention token by token: query i sees key j where `see(i, j)`. `[1, T, C]`, float64."""
    x, (heads, size) = x[0].double(), (UPSTREAM["num_attention_heads"], module.head_dim)
    angle = torch.arange(len(x)).double()[:, None] / 1e6 ** (torch.arange(0, size, 2).double() / size)
    q, k, v = (
        F.linear(x, projection.weight.double(), projection.bias.double()).unflatten(-1, (-1, size)).transpose(0, 1)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )

    def rotated(z):
        a, b = z.chunk(2, dim=-1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)

    q, k, v = rotated(q), *(z.repeat_interleave(heads // len(z), dim=0) for z in (rotated(k), v))
    out = torch.zeros_like(q)
    for i in range(len(x)):
        seen = [j for j in range(len(x)) if see(i, j)]
        weights = (q[:, i : i + 1] @ k[:, seen].mT / size**0.5).softmax(-1)
        out[:, i] = (weights @ v[:, seen])[:, 0]
    return F.linear(out.transpose(0, 1).flatten(1), module.o_proj.weight.double())[None]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 50])
@torch.no_grad()
def test_without_a_mask_the_last_token_counts_and_a_sliding_layer_sees_itself(model, golden, tokens, implementation):
    """The original, under sdpa and without a mask, takes the last token for a pad, and hides a token from itself."""
    model.set_attn_implementation(implementation)
    seen = {}
    for i in (1, 3, 5):
        attention = model.model.layers[i].self_attn
        attention.register_forward_hook(lambda module, x, out: seen.update({module: (x[0], out[0])}))
    model(golden["short.input_ids"][:1, :tokens])
    assert len(seen) == 3
    for module, (x, out) in seen.items():
        window = WINDOW if module.layer_idx in (3, 5) else tokens
        close(out.double(), attended(module, x, lambda i, j, w=window: 0 <= i - j < w), 1e-5)
        if tokens > 1:
            without_last = attended(module, x, lambda i, j: i >= j and (j < tokens - 1 or i == 0))
            assert (out - without_last)[:, -1].abs().max() > 1e-2
        if window < tokens:
            not_itself = attended(module, x, lambda i, j: 1 <= i - j < WINDOW or i == j == 0)
            assert (out - not_itself)[:, -1].abs().max() > 1e-2


@pytest.mark.parametrize("given", [False, True])
@torch.no_grad()
def test_a_row_that_ends_early_goes_on_as_it_would_alone(shared, golden, given):
    """Tokens that generate feeds a row after its end are pads to Jet layers too: nobody could take them back."""
    prompts, question = golden["short.input_ids"][:, :6], golden["short.input_ids"][:1, 30:32]
    options = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    said = shared.generate(prompts, max_new_tokens=9, eos_token_id=None, **options).sequences[:, 6:].tolist()
    end = next(token for i, token in enumerate(said[0]) if 1 < i < 6 and token not in said[0][:i] + said[1])
    length = 6 + said[0].index(end) + 1

    def second_turn(ids, sequences, cache, mask):
        ids = torch.cat((sequences, question.expand(len(ids), -1)), dim=1)
        mask = torch.cat((mask, torch.ones(len(ids), 2, dtype=torch.long)), dim=1)
        return shared.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=3, output_logits=True, **options)

    # With a pad in front there is a mask from the start.
    front = torch.zeros(2, int(given), dtype=torch.long)
    mask = torch.cat((front, torch.ones_like(prompts)), dim=1)
    both = shared.generate(
        torch.cat((front, prompts), dim=1), attention_mask=mask, max_new_tokens=9, eos_token_id=end, **options
    )
    mask = torch.cat((front, torch.ones(2, 15, dtype=torch.long)), dim=1)
    mask[0, int(given) + length :] = 0
    batch = second_turn(prompts, both.sequences, both.cache, mask)
    one = shared.generate(prompts[:1], max_new_tokens=9, eos_token_id=end, **options)
    assert one.sequences.shape[1] == length < 14
    alone = second_turn(prompts[:1], one.sequences, one.cache, torch.ones_like(one.sequences))
    close(batch.logits[0][:1], alone.logits[0])
    assert torch.equal(batch.sequences[0, -3:], alone.sequences[0, -3:])


def test_stateful_models_are_not_assisted(shared, golden):
    ids = golden["short.input_ids"][:1]
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        shared.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=2, pad_token_id=0)


def test_what_would_have_to_take_back_what_was_read_is_refused(shared, golden):
    ids, config = golden["short.input_ids"][:1], {"vocab_size": 128, "hidden_size": 32, "num_attention_heads": 2}
    config |= {"intermediate_size": 32, "num_hidden_layers": 1, "eos_token_id": None}
    target = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config)).eval()
    with pytest.raises(ValueError, match="JetNemotronForCausalLM cannot be the assistant_model of another model"):
        target.generate(ids, assistant_model=shared, max_new_tokens=2, pad_token_id=0, do_sample=False)
    for call in (
        lambda: shared.generate(ids, cache_implementation="paged", max_new_tokens=2),
        lambda: shared.generate_batch([[1, 2, 3]], max_new_tokens=2),
        lambda: shared.init_continuous_batching(),
    ):
        with pytest.raises(NotImplementedError, match="paged KV cache, which cannot hold fast weights: use generate"):
            call()


@pytest.mark.parametrize("part", ["model", "causal_lm"])
def test_the_cache_answers_to_both_names(shared, golden, part):
    answers_to_both_names(shared.model if part == "model" else shared, golden["short.input_ids"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda m: {}, "pass exactly one of input_ids and inputs_embeds"),
        (
            lambda m: {"input_ids": torch.ones(1, 2, dtype=torch.long), "inputs_embeds": torch.ones(1, 2, 64)},
            "pass exactly one of input_ids and inputs_embeds",
        ),
        (
            lambda m: {"input_ids": torch.ones(1, 2, dtype=torch.long), "cache": DynamicCache()},
            r"cache has 0 layers, the model 6: .*DynamicCache\(config=model.config\)",
        ),
        (
            lambda m: {
                "input_ids": torch.ones(1, 4, dtype=torch.long),
                "position_ids": torch.tensor([[0, 1, 0, 1]]),
            },
            r"several packed samples \(it has position_ids that restart\): .* a row of its own",
        ),
        (
            lambda m: {
                "input_ids": torch.ones(1, 4, dtype=torch.long),
                "attention_mask": torch.ones(1, 4, dtype=torch.long),
                "position_ids": torch.tensor([[0, 1, 0, 1]]),
            },
            r"several packed samples \(it has position_ids that restart\): .* a row of its own",
        ),
        (
            lambda m: {
                "input_ids": torch.ones(1, 4, dtype=torch.long),
                "cu_seq_lens_q": torch.tensor([0, 2, 4]),
                "cu_seq_lens_k": torch.tensor([0, 2, 4]),
            },
            r"several packed samples \(it has cu_seq_lens_q, cu_seq_lens_k\)",
        ),
        (
            lambda m: {
                "input_ids": torch.ones(1, 2, dtype=torch.long),
                "attention_mask": torch.ones(1, 1, 2, 2, dtype=torch.bool),
            },
            r"attention_mask has shape \(1, 1, 2, 2\): Jet layers must know which tokens are pads",
        ),
        (
            lambda m: {
                "input_ids": torch.ones(1, 2, dtype=torch.long),
                "attention_mask": {"full_attention": None, "sliding_attention": None},
            },
            "attention_mask has no 'linear_attention': give the .* mask of pads, or None",
        ),
    ],
)
def test_what_cannot_be_read_says_so(shared, arguments, message):
    with pytest.raises(ValueError, match=message):
        shared(**arguments(shared))


@torch.no_grad()
def test_embeddings_and_positions_may_be_given(shared, golden):
    ids = golden["short.input_ids"]
    output = shared(inputs_embeds=shared.model.embed_tokens(ids), position_ids=torch.arange(50)[None] + 7)
    close(output.logits, golden["short.logits"])
    assert torch.equal(shared(ids, logits_to_keep=3).logits, shared(ids).logits[:, -3:])


# Attention, precision, training.


@torch.no_grad()
def test_eager_attention_is_sdpa(model, golden):
    model.set_attn_implementation("eager")
    ids, mask = golden["padded.input_ids"], golden["padded.attention_mask"]
    output = model(ids, attention_mask=mask, output_attentions=True)
    real = mask.bool()
    close(output.logits[real], golden["padded.logits"][real])
    assert [weights.shape for weights in output.attentions] == [(2, 4, 50, 50)] * 3
    assert output.attentions[1][0, :, 40, 20].eq(0).all()
    assert output.attentions[1][0, :, 40, 21].gt(0).all()


@torch.no_grad()
def test_attention_can_be_replaced(model, golden):
    seen = []

    def spy(module, *args, **kwargs):
        seen.append((module.layer_idx, kwargs["sliding_window"]))
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("sdpa_spy", spy)
    model.set_attn_implementation("sdpa_spy")
    close(model(golden["short.input_ids"]).logits[:, :WINDOW], golden["short.logits"][:, :WINDOW])
    assert seen == [(1, None), (3, WINDOW), (5, WINDOW)]


@torch.no_grad()
def test_bfloat16_keeps_its_gates(shared, golden):
    model = JetNemotronForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if name.endswith(("A_log", "dt_bias")) else torch.bfloat16
        assert parameter.dtype == wanted, name
    for i in JET_LAYERS:
        assert torch.equal(model.model.layers[i].self_attn.A_log, shared.model.layers[i].self_attn.A_log)
    ids, wanted = golden["short.input_ids"], golden["short.logits"]
    logits, cache = continued(model, ids, [40, 1, 9])
    assert logits.dtype == torch.bfloat16
    assert cache.layers[0].recurrent_states[0].dtype == torch.float32
    assert cache.layers[0].conv_states[0].dtype == torch.bfloat16
    error = (logits.float() - wanted).square().mean().sqrt() / wanted.std()
    assert error < 0.05
    assert model.config.to_dict()["torch_dtype"] == "bfloat16"


@torch.no_grad()
def test_the_norm_multiplies_before_it_casts(shared):
    norm = copy.deepcopy(shared.model.norm).bfloat16()
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    normed = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert torch.equal(norm(x), (normed * norm.weight.float()).bfloat16())
    assert not torch.equal(norm(x), normed.bfloat16() * norm.weight)


def gradients(model, *args, **kwargs):
    model.zero_grad()
    model(*args, **kwargs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def same_gradients(ones, others, atol=1e-6):
    assert ones.keys() == others.keys()
    for name in ones:
        torch.testing.assert_close(ones[name], others[name], atol=atol, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_invisible(model, golden, reentrant):
    model.train()
    ids, mask = golden["padded.input_ids"], golden["padded.attention_mask"]
    inputs = {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "use_cache": False}
    runs = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: runs.append(0))
    plain = gradients(model, ids, **inputs)
    assert len(runs) == 1
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    same_gradients(gradients(model, ids, **inputs), plain)
    assert len(runs) == 3


def test_a_cache_does_not_disturb_training(model, golden):
    model.train()
    ids = golden["short.input_ids"]
    plain = gradients(model, ids, labels=ids, use_cache=False)
    assert model.config.use_cache
    same_gradients(gradients(model, ids, labels=ids), plain)


@pytest.mark.parametrize("sizes", [[25, 25], [47, 1, 1, 1]])
def test_gradients_pass_through_a_cache(model, golden, sizes):
    ids = golden["short.input_ids"]
    plain = gradients(model, ids, labels=ids, use_cache=False)
    logits, _ = continued(model, ids, sizes)
    model.zero_grad()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    same_gradients({name: parameter.grad for name, parameter in model.named_parameters()}, plain, 1e-5)


def test_training_lowers_the_loss(golden):
    model = JetNemotronForCausalLM(JetNemotronConfig.from_pretrained(FOLDER)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = golden["long.input_ids"][:, :37]
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids, num_items_in_batch=torch.tensor(36)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.filterwarnings("ignore:.*rope_scaling.*:FutureWarning")
def test_trainer_goes_on_from_its_checkpoint(golden, tmp_path):
    """It reads the checkpoint's config.json, in which upstream's layer types stand, with transformers' base class."""
    rows = [{"input_ids": golden["long.input_ids"][0], "labels": golden["long.input_ids"][0]}] * 4
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_steps": 1, "logging_steps": 1}

    def losses(steps: int, resume: bool) -> list[float]:
        lm = AutoModelForCausalLM.from_pretrained(FOLDER)
        trainer = Trainer(lm, TrainingArguments(str(tmp_path), max_steps=steps, **quiet), train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    first = losses(1, resume=False)
    assert losses(2, resume=True)[0] == first[0]
    assert losses(2, resume=True)[1] < first[0]


def test_jet_layers_are_the_mixer_that_a_retrofit_injects(shared):
    assert [i for i, layer in enumerate(shared.model.layers) if isinstance(layer.self_attn, Jet)] == list(JET_LAYERS)
    assert JetNemotronDecoder.default_loop_layers(JetNemotronConfig()) == (7, 21)
    assert SleepConfig(window_size=8).resolve(shared.config).loop_layers == (1, 5)
