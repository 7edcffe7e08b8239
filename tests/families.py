"""Tiny random members of every supported base family, and how the tests turn them into sleeping models."""

import re
import warnings
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hf_sleep import SleepConfig
from hf_sleep.compat import CACHE
from hf_sleep.layers import FastWeightBlock

VOCAB = 61
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LINEAR = {
    # Their gated norm divides by a lone first token's q·k, which may be next to nothing.
    "rms_norm_eps": 1e-3,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 10000.0}

_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_PARTIAL = {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5}}
_SCALES = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.6, "attention_multiplier": 0.4}

FAMILIES = {
    "llama": ("llama", {}),
    "llama_yarn": ("llama", {"rope_parameters": _YARN}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_window": ("mistral", {"sliding_window": 4}),
    "gemma3": ("gemma3_text", {"sliding_window": 4, "layer_types": _MIXED, "query_pre_attn_scalar": 8}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 4, "layer_types": _MIXED}),
    "qwen3_next": (
        "qwen3_next",
        _LINEAR
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "rope_parameters": _ROPE | {"partial_rotary_factor": 0.5},
        },
    ),
    "qwen3_5": (
        "qwen3_5_text",
        _LINEAR | {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    ),
    "olmo_hybrid": ("olmo_hybrid", _LINEAR | {"rope_parameters": _ROPE}),
    "olmo_hybrid_nope": ("olmo_hybrid", _LINEAR | {"rope_parameters": None}),
    "jet_nemotron": (
        "jet_nemotron",
        {
            "layer_types": ["jet", "attn", "jet", "swa"],
            "efficient_attention_config": {
                "jet": {
                    "num_heads": 2,
                    "head_dim": 6,
                    "expand_v": 2.6666666667,
                    "conv_size": 4,
                    "dconv_generator_reduction": 8,
                    "norm_eps": "1e-5",
                },
                "swa": {"window_size": 4},
            },
        },
    ),
    "ouro": ("ouro", {"total_ut_steps": 1}),
    # With the common 40 these weights amplify rounding: the reference's own float32 gradients are off by 4e-4.
    "phi3": ("phi3", _PARTIAL | {"sliding_window": 4, "intermediate_size": 36}),
    "qwen3_moe": ("qwen3_moe", _EXPERTS),
    "mixtral": ("mixtral", _EXPERTS | {"sliding_window": None}),
    "granite": ("granite", _SCALES),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
    "glm4": ("glm4", {}),
    "gpt_oss": ("gpt_oss", _EXPERTS | {"sliding_window": 4, "layer_types": _MIXED}),
    "ministral": ("ministral", {"sliding_window": 4, "layer_types": _MIXED}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            "layer_types": _LINEAR["layer_types"],
            "rms_norm_eps": 1e-3,
            "mamba_n_heads": 4,
            "mamba_n_groups": 2,
            "mamba_d_state": 8,
            "time_step_limit": (0.15, 0.6),
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.0,
        },
    ),
    "kimi_linear": (
        "kimi_linear",
        {
            "layer_types": _LINEAR["layer_types"],
            "rms_norm_eps": 1e-3,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "linear_head_dim": 8,
            "linear_num_heads": 3,
            "num_key_value_heads": 4,
            # The two that are cached, 28 + 4 numbers a token, are as many as 4 heads of 4 keys and 4 values.
            "head_dim": 4,
            "kv_lora_rank": 28,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
            "v_head_dim": 5,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
    ),
}
# Listed too; they differ from those above in their layers' insides, so that a few laws are enough.
MORE_FAMILIES = {
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "cohere": ("cohere", {"logit_scale": 0.5}),
    "cohere2": ("cohere2", {"logit_scale": 0.5, "sliding_window": 4, "layer_types": _MIXED}),
    "ernie4_5": ("ernie4_5", {}),
    "exaone4": ("exaone4", {"sliding_window": 4, "layer_types": _MIXED}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 4, "layer_types": _MIXED, "query_pre_attn_scalar": 8}),
    "glm": ("glm", {}),
    "granitemoe": ("granitemoe", _EXPERTS | _SCALES),
    "helium": ("helium", {}),
    "nemotron": ("nemotron", _PARTIAL),
    "olmoe": ("olmoe", _EXPERTS),
    "seed_oss": ("seed_oss", {}),
    "smollm3_window": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, "sliding_window": 4, "layer_types": _MIXED},
    ),
    "stablelm": ("stablelm", _PARTIAL),
    "starcoder2": ("starcoder2", {"sliding_window": 4}),
}
EAGER = ("gemma2", "gpt_oss")  # sdpa has neither soft caps nor sinks of its own
_BAMBA = {"attn_layer_indices": [1, 3], "mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_d_state": 8}
# Close to one of them: too close for the whole matrix of laws.
RELATIVES = {
    "bamba": ("bamba", _BAMBA | {"rms_norm_eps": 1e-3}),
    "granite_dense": (
        "granitemoehybrid",
        FAMILIES["granitemoehybrid"][1]
        | {"num_local_experts": 0, "position_embedding_type": "rope", "rope_parameters": _ROPE, "mamba_n_groups": 1}
        | {"mamba_conv_bias": False, "mamba_proj_bias": True, "time_step_limit": (0.0, float("inf"))},
    ),
    "kimi_low_rank": ("kimi_linear", FAMILIES["kimi_linear"][1] | {"q_lora_rank": 12, "attention_bias": True}),
}
HYBRIDS = (
    "qwen3_next",
    "qwen3_5",
    "olmo_hybrid",
    "olmo_hybrid_nope",
    "jet_nemotron",
    "granitemoehybrid",
    "kimi_linear",
)
# Whose untrained retrofit is the base bit for bit: the recurrence of stock hybrids runs on our op instead.
BITWISE = tuple(name for name in FAMILIES if name not in HYBRIDS or name == "jet_nemotron")


def sleep_config(family: str, **fields) -> SleepConfig:
    """A small `SleepConfig` whose blocks lie before, inside and after the looped ranges that the laws use.

    A hybrid is slept with its own linear layers, plus one injected block, so that the two kinds of memory meet. All
    layers loop but of Jet-Nemotron, which loops its middle half.
    """
    layers = (1,) if family in HYBRIDS or family in RELATIVES else (0, 2)
    loop = None if family == "jet_nemotron" else (0, 4)
    defaults = {
        "window_size": 6,
        "between": "none",
        "loop_layers": loop,
        "block_layers": layers,
        "block_num_heads": 2,
        "block_head_dim": 8,
    }
    return SleepConfig(**(defaults | fields))


def make_config(family: str):
    """The config of a base of four layers."""
    model_type, fields = (FAMILIES | MORE_FAMILIES | RELATIVES)[family]
    return AutoConfig.for_model(model_type, **(_COMMON | fields))


def make_base(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A base causal LM with random weights that are large enough for every layer to matter."""
    config = make_config(family)
    attention = "eager" if config.model_type in EAGER else "sdpa"
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention, experts_implementation="eager")
    randomize(base, seed)
    return base.to(dtype).eval()


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> None:
    """Give every parameter seeded non-trivial values, zero-initialised ones included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "A_log":
            value = 0.3 * noise - 0.5
        elif leaf == "dt_bias":
            value = 0.5 * noise - 1.0
        elif "norm" in name:
            value = parameter + 0.2 * noise
        elif parameter.ndim == 3 or leaf == "conv_weight":
            value = 0.4 * noise
        elif "embed_tokens" in name and not module.config.tie_word_embeddings:
            value = noise
        elif re.search(r"linear_attn\.(?!.*(out|o_proj)).*weight$|mamba\.in_proj", name):
            value = 0.14 * noise
        elif "kernel_generator" in name and leaf == "bias":
            value = parameter + 0.2 * noise
        else:
            value = 0.2 * noise
        parameter.copy_(value)


def make_model(
    family: str, sleep: SleepConfig, dtype: torch.dtype = torch.float32, trained: bool = True, seed: int = 0
) -> nn.Module:
    """A sleeping model in eval mode; `trained` gives its blocks values with which memory matters."""
    from hf_sleep import SleepForCausalLM

    model = SleepForCausalLM.from_base(make_base(family, dtype, seed), sleep)
    if trained:
        randomize(model.fast_weights, seed + 1)
        randomize(model.between, seed + 2)
    return model.to(dtype).eval()


def make_stand_in(family: str, sleep: SleepConfig, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Parts of a sleeping model that the reference reads, built without the engine."""
    base = make_base(family, dtype, seed)
    sleep = sleep.resolve(base.config)
    blocks = nn.ModuleDict()
    for layer in sleep.block_layers:
        block = FastWeightBlock(
            sleep.block_kind,
            base.config.hidden_size,
            sleep.block_num_heads,
            sleep.block_head_dim,
            sleep.block_expand_v,
            sleep.block_conv_size,
        )
        block.init_weights(0.02)
        blocks[str(layer)] = block
    randomize(blocks, seed + 1)
    blocks, settings = blocks.to(dtype).eval(), SimpleNamespace(sleep=sleep)
    return SimpleNamespace(lm=base, fast_weights=blocks, between=None, config=settings)


def tokens(length: int, seed: int = 1) -> torch.Tensor:
    """`[length]` random token ids, the pad token never among them."""
    return torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def answers_to_both_names(model: nn.Module, input_ids: torch.Tensor) -> None:
    """Check that a stock-shaped model takes and returns its cache as `cache` and as `past_key_values`."""
    cache, spare = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = model(input_ids, past_key_values=cache)
    # Before 5.24 transformers passes it by the old name itself, so there nothing warns.
    assert {warning.category for warning in caught} == ({FutureWarning} if CACHE == "cache" else set())
    assert out.cache is cache
    assert out.cache is out["cache"] is out.get("cache") is out.past_key_values is out["past_key_values"]
    assert "cache" in out
    assert "past_key_values" in out
    for found in (model(input_ids, cache=spare), model(input_ids)):
        assert found.cache.get_seq_length() == input_ids.shape[1]
    with pytest.raises((ValueError, FutureWarning), match=r"not as both|Both `past_key_values` and `cache`"):
        model(input_ids, past_key_values=cache, cache=spare)
    assert spare.get_seq_length() == input_ids.shape[1]


@contextmanager
def exact():
    """Let stock modules compute in float64 where they cast to float32 (norms, rotary tables, router, gates, loss).

    Without it a float64 comparison of two summation orders stops at float32's 1e-7.
    """
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield
