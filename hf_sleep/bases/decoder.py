"""The contract of a family's adapter, which runs a base model's decoder layers one by one."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from ..compat import CACHE
from ..layers.recurrence import GatedDeltaMixer
from ..memory import KV, FastWeights
from ..placement import as_forward
from ..registry import BASES, register_base

Rope = tuple[torch.Tensor, torch.Tensor] | None
"""An attention layer's `position_embeddings`: cos and sin, `[B, T, D]`; `None` where they want none."""


@functools.cache
def _has_field(kind: Any, name: str) -> bool:
    if not kind.__module__.startswith("transformers."):
        return True  # it may hand on what its parent reads
    return hasattr(kind, name) or name in kind.attribute_map or name in inspect.signature(kind).parameters


def _field(config: PreTrainedConfig, name: str) -> Any:
    """A field of a config; `None` where transformers' class has none of that name, so that its model reads none."""
    kind: Any = type(config)
    return getattr(config, name, None) if _has_field(kind, name) else None


def _refuse_attention(config: PreTrainedConfig) -> None:
    """Raise `ValueError` for a base that reads ahead, or that computes attention in a way that cannot be used here."""
    if getattr(config, "is_causal", True) is False:
        raise ValueError(
            "text_config.is_causal=False: such a model reads ahead, so it cannot sleep on what it has read; only "
            "causal decoders work"
        )
    implementation = config._attn_implementation
    why = {
        "flex_attention": "takes block masks, which are not made here",
        "paged": "reads a paged KV cache, which cannot hold fast weights",
    }.get(implementation.partition("|")[0])
    if why:
        raise ValueError(f"attn_implementation={implementation!r} {why}: load the base with attn_implementation='sdpa'")


@register_base(
    *("llama", "mistral", "ministral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "olmo2", "olmoe", "phi3", "gemma"),
    *("gemma2", "stablelm", "nemotron", "seed_oss", "arcee", "apertus"),
)
class Decoder:
    """Runs the parts of a Llama-shaped base: `lm.model.{embed_tokens,layers,norm,rotary_emb}` and `lm.lm_head`.

    A Llama-shaped family needs nothing but its name. For another one, subclass this, override what differs, and
    decorate the subclass with `register_base(model_type)`.

    A *kind* of layer is a free name, one per decoder layer. Masks and RoPE are made once for all layers of a kind, so
    layers with another window or other positions need a kind of their own.

    Args:
        lm: the base causal LM. Nothing of it is changed.
    """

    recurrent_kinds: frozenset[str] = frozenset({"linear_attention"})
    """Kinds whose layers are the base's own linear-recurrent ones: its fast weights."""

    fp32_parameters: tuple[str, ...] = GatedDeltaMixer.fp32_parameters
    """Last parts of the names of parameters that are kept fp32 at least, whatever the model's dtype."""

    recurrence_flops = 6
    """FLOPs of its own recurrence per token and number in the state: S is read at k, written, and read at q."""

    norm_every_pass = False
    """True where the base's final norm closes every pass over its layers, and not the last alone."""

    default_between = "gate"
    """What lies between two passes where `SleepConfig.between` leaves it open."""

    interleaved_rope = False
    """True where RoPE turns channels 2j and 2j + 1 of a head together, and not j and j plus half of those that turn."""

    # From the config alone, before there is a model.

    @classmethod
    def layer_kinds(cls, config: PreTrainedConfig) -> list[str]:
        """The kind of every decoder layer, in order."""
        types, window = (_field(config, name) for name in ("layer_types", "sliding_window"))
        default = "sliding_attention" if types is None and window is not None else "full_attention"
        return list(types or [default] * config.num_hidden_layers)

    @classmethod
    def has_fast_weights(cls, config: PreTrainedConfig) -> bool:
        """Tell whether the base has linear-recurrent layers of its own, so that it sleeps without injected blocks."""
        return not cls.recurrent_kinds.isdisjoint(cls.layer_kinds(config))

    @classmethod
    def default_loop_layers(cls, config: PreTrainedConfig) -> tuple[int, int]:
        """Half-open range of the layers that a sleep runs again where `SleepConfig.loop_layers` leaves it open.

        A config may say it as `default_loop_layers`; otherwise the middle third, in whole periods of `layer_kinds`.
        """
        return getattr(config, "default_loop_layers", None) or middle_third(cls.layer_kinds(config))

    def __init__(self, lm: PreTrainedModel):
        _refuse_attention(lm.config)
        self.lm = lm
        self.config = lm.config
        self.model: Any = lm.model
        self.layers: Any = lm.model.layers
        self.kinds = self.layer_kinds(self.config)

    @property
    def base_loops(self) -> int:
        """Number of times that the plain base runs its layers over a token, each with KV of its own."""
        return 1

    @property
    def attention_kinds(self) -> list[str]:
        """The kinds of its attention layers, each once."""
        return sorted({kind for kind in self.kinds if kind not in self.recurrent_kinds})

    @property
    def attention_implementation(self) -> str:
        """Name of the base's way to compute attention: `"sdpa"`, `"eager"`, `"flash_attention_2"`, …"""
        return self.config._attn_implementation

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Turn token ids into what the first layer reads: `[B, T]` to `[B, T, C]`."""
        return self.first_input(self.model.embed_tokens(input_ids))

    def first_input(self, embeds: torch.Tensor) -> torch.Tensor:
        """Turn a caller's `inputs_embeds` into what the first layer reads: `[B, T, C]` to `[B, T, C]`."""
        return embeds

    # Attention layers.

    def own_window(self, kind: str) -> int | None:
        """The base's own attention window in layers of this kind, in tokens; `None` where it has none."""
        return self.config.sliding_window if kind == "sliding_attention" else None

    def rope(self, x: torch.Tensor, position_ids: torch.Tensor, kind: str) -> Rope:
        """Make the `position_embeddings` of attention layers of this kind, for positions `[B, T]`."""
        return self.model.rotary_emb(x, position_ids)

    def frequencies(self, kind: str) -> torch.Tensor | None:
        """RoPE's inverse frequencies in layers of this kind, radians per position; `None` where there is no RoPE."""
        return self.model.rotary_emb.inv_freq

    def rope_width(self, kind: str) -> int | None:
        """Last dimension of the tables that `rope` gives in layers of this kind; `None` where it gives `None`."""
        frequencies = self.frequencies(kind)
        return None if frequencies is None else 2 * len(frequencies)

    def shift_keys(self, keys: torch.Tensor, shift: torch.Tensor, kind: str) -> torch.Tensor:
        """Rotate cached keys `[B, H, T, D]` by `shift` `[B]` further positions, as RoPE would (`shift` on the CPU)."""
        frequencies = self.frequencies(kind)
        if frequencies is None:
            return keys
        # In float64 on the CPU: Apple's GPUs have none.
        angle = (shift.double().unsqueeze(1) * frequencies.cpu().double()).view(len(shift), 1, 1, -1)
        dtype = torch.promote_types(keys.dtype, torch.float32)
        cos, sin = (table.to(dtype).to(keys.device) for table in (angle.cos(), angle.sin()))
        turning, rest = keys.to(dtype).tensor_split((2 * angle.shape[-1],), dim=-1)
        x, y = turning.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved_rope else turning.chunk(2, dim=-1)
        turned = x * cos - y * sin, y * cos + x * sin
        turning = torch.stack(turned, dim=-1).flatten(-2) if self.interleaved_rope else torch.cat(turned, dim=-1)
        return torch.cat((turning, rest), dim=-1).to(keys.dtype)

    def attention_layer(
        self, index: int, x: torch.Tensor, rope: Rope, mask: torch.Tensor | None, kv: Any
    ) -> torch.Tensor:
        """Run decoder layer `index`; `kv.update` is called with its new keys and values `[B, H, T, D]`."""
        layer: Any = self.layers[index]
        # Its hooks would run twice.
        forward = self.layers[index].forward if isinstance(layer, FSDPModule) else layer

        def run(x: torch.Tensor, pair: Any) -> Any:
            kv.pair = pair
            x = forward(x, attention_mask=mask, position_embeddings=rope, use_cache=True, **{CACHE: kv})
            return x, kv.pair

        x, kv.pair = as_forward(layer, run, x, kv.pair)
        return x

    def attention_flops(self, index: int, tokens: int, keys: int, kv: KV) -> int:
        """FLOPs in which `tokens` queries of attention layer `index` meet `keys` keys, the masked ones too.

        What a token spends in the layer's own matrices is counted elsewhere.

        Args:
            kv: what the layer caches of one token.
        """
        return 2 * tokens * keys * self.config.num_attention_heads * (kv.keys.shape[-1] + kv.values.shape[-1])

    # The base's own linear-recurrent layers.

    def empty_fast_weights(self, index: int, batch_size: int, device: torch.device, dtype: torch.dtype) -> FastWeights:
        """Make what linear-recurrent layer `index` carries before it has read anything; `dtype` is the activations'."""
        raise self._no_recurrent_layers("empty_fast_weights")

    def recurrent_layer(
        self, index: int, x: torch.Tensor, fast_weights: FastWeights, lengths: torch.Tensor | None, decays: bool
    ) -> tuple[torch.Tensor, FastWeights]:
        """Run decoder layer `index`, one of the base's own linear-recurrent layers.

        Args:
            x: `[B, T, C]`.
            fast_weights: what the layer carried out of the tokens before; left as it is.
            lengths: `[B]` real tokens per row, pads after them; `None` where all T are real.
            decays: whether what was written before decays.
        """
        layer: Any = self.layers[index]

        def run(x: torch.Tensor, carried: FastWeights) -> tuple[torch.Tensor, FastWeights]:
            mixed, carried = self.mix(layer, layer.input_layernorm(x), carried, lengths, decays)
            x = x + mixed
            return x + layer.mlp(layer.post_attention_layernorm(x)), FastWeights(*carried)

        return as_forward(layer, run, x, fast_weights)

    def mix(
        self, layer: Any, x: torch.Tensor, fast_weights: FastWeights, lengths: torch.Tensor | None, decays: bool
    ) -> tuple[torch.Tensor, FastWeights]:
        """The mixer of a linear-recurrent decoder layer, on its normed input `[B, T, C]`."""
        raise self._no_recurrent_layers("mix")

    def mixer(self, index: int) -> nn.Module:
        """The module of linear-recurrent layer `index` that writes and reads its fast weights."""
        raise self._no_recurrent_layers("mixer")

    def fast_weight_parameters(self) -> set[str]:
        """Names within `lm` of the parameters that write and read the base's own fast weights."""
        mixers = [self.mixer(i) for i, kind in enumerate(self.kinds) if kind in self.recurrent_kinds]
        own = {id(parameter) for mixer in mixers for parameter in mixer.parameters()}
        return {name for name, parameter in self.lm.named_parameters() if id(parameter) in own}

    def _no_recurrent_layers(self, method: str) -> NotImplementedError:
        return NotImplementedError(
            f"{type(self).__name__} names linear-recurrent layers ({', '.join(sorted(self.recurrent_kinds))}) and "
            f"does not say how to run them: override {method}"
        )

    # After the last layer.

    @property
    def final_norm(self) -> nn.Module:
        """The module that norms what the last layer made."""
        return self.model.norm

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """The base's final norm: `[..., C]` to `[..., C]`."""
        return self.final_norm(x)

    def head_input(self, x: torch.Tensor) -> torch.Tensor:
        """Make what the head reads, a stock model's `last_hidden_state`: `[..., C]` to `[..., C]`.

        It applies the final norm, where the passes have not. What scales or caps the logits comes after the head, in
        `logits`: who applies the head himself, as TRL's trainers do, reads it from the base's config.
        """
        return x if self.norm_every_pass else self.norm(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Final norm, head, and what scales or caps its output: `[..., C]` to `[..., vocab]`."""
        logits = self.lm.get_output_embeddings()(self.head_input(x))
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits


def period_of(kinds: Sequence[str]) -> int:
    """Layers in the shortest pattern that makes `kinds` when it is said two or more times; 1 where none does.

    Less than one pattern may be left over after the last, and differ.
    """
    depth = len(kinds)
    for period in range(1, depth // 2 + 1):
        times = depth // period
        if list(kinds[: times * period]) == times * list(kinds[:period]):
            return period
    return 1


def middle_third(kinds: Sequence[str]) -> tuple[int, int]:
    """Half-open range of about a third of the layers, in the middle, rounded to whole periods and towards layer 0.

    A base that was not pre-trained with loops expects in its first layers what the embedding gives, and makes in its
    last layers what the head reads. Its middle layers read and write alike.

    Args:
        kinds: of every decoder layer, in order.
    """
    depth, period = len(kinds), period_of(kinds)
    length = period * max(1, round(depth / (3 * period)))
    first = (depth - length) // 2
    first -= first % period
    return first, first + length


PARTS: dict[str, Callable[[Any], Any]] = {
    "model.embed_tokens": lambda lm: lm.model.embed_tokens,
    "model.layers": lambda lm: lm.model.layers,
    "model.norm": lambda lm: lm.model.norm,
    "model.rotary_emb": lambda lm: lm.model.rotary_emb,
    "get_output_embeddings()": lambda lm: lm.get_output_embeddings().weight,
}
"""Parts of a base that `Decoder` reads, by name."""


def missing_parts(lm: PreTrainedModel) -> list[str]:
    """Names of what a Llama-shaped body has and `lm` has not."""
    missing = []
    for name, get in PARTS.items():
        try:
            get(lm)
        except (AttributeError, NotImplementedError):
            missing.append(name)
    return missing


def adapter_of(config: PreTrainedConfig) -> type[Decoder]:
    """The adapter's class for a base's config: its family's, or the plain `Decoder`."""
    known = config.model_type in BASES
    return BASES[config.model_type] if known else Decoder


def decoder_for(lm: PreTrainedModel) -> Decoder:
    """The adapter for a base model: its family's, or the plain `Decoder` where the base has a Llama-shaped body.

    Whether the plain `Decoder` computes what an unlisted family computes, `hf_sleep.bases.probe` finds out.

    Args:
        lm: a causal LM.

    Raises:
        ValueError: an unlisted family with another body, with what it lacks and what an adapter for it must say.
    """
    family = lm.config.model_type
    if family not in BASES:
        _refuse_other_bodies(lm)
    return adapter_of(lm.config)(lm)


def _refuse_other_bodies(lm: PreTrainedModel) -> None:
    """Raise unless the base of an unlisted family has a Llama-shaped body."""
    family = lm.config.model_type
    refused = f"no decoder adapter for model_type={family!r}, and {type(lm).__name__} is not Llama-shaped: "
    if missing := missing_parts(lm):
        raise ValueError(f"{refused}it has no {', '.join(missing)}. {what_an_adapter_needs(family)}")
    if unknown := set(Decoder.layer_kinds(lm.config)) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{refused}it has {', '.join(sorted(unknown))} layers. {what_an_adapter_needs(family)}")


def what_an_adapter_needs(family: str) -> str:
    """Say in an error how to add a family."""
    return (
        f"Write an adapter: a subclass of hf_sleep.bases.Decoder, decorated with hf_sleep.register_base({family!r}), "
        "that says how to embed ids, compute RoPE, run one decoder layer, read the base's own linear-recurrent layers "
        f"if it has any, and compute logits. There are adapters for {', '.join(BASES.names())}"
    )
