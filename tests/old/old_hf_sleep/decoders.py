"""How to run a base model's decoder layers one by one: an adapter per family, and nothing else that knows families."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from .compat import CACHE
from .layers.recurrence import State
from .offload import as_forward, loaded
from .ops import gated_delta_rule, short_convolution

Rope = tuple[torch.Tensor, torch.Tensor] | None


class Decoder:
    """Runs the parts of a Llama-shaped base: `lm.model.{embed_tokens,layers,norm,rotary_emb}` and `lm.lm_head`.

    To support a family, subclass it, override what differs, and list its `model_type` in `DECODERS`.

    Args:
        lm: the base causal LM. Nothing of it is changed.
    """

    norm_every_pass = False
    """Whether the base's final norm closes every pass over its layers, and not the last alone."""

    @property
    def base_loops(self) -> int:
        """How often the plain base runs its layers over a token, each time with KV of its own."""
        return 1

    def __init__(self, lm: PreTrainedModel):
        if lm.config._attn_implementation.startswith("paged|"):
            raise ValueError(
                f"attn_implementation={lm.config._attn_implementation!r} reads a paged KV cache, which cannot hold "
                "fast weights: load the base with attn_implementation='sdpa'"
            )
        self.lm = lm
        self.config = lm.config
        self.model: Any = lm.model
        self.layers: Any = lm.model.layers
        types = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        default = "sliding_attention" if types is None and window is not None else "full_attention"
        self.kinds: list[str] = list(types or [default] * len(self.layers))

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids `[B, T]` to `[B, T, C]`."""
        return self.model.embed_tokens(input_ids)

    def own_window(self, kind: str) -> int | None:
        """The base's own attention window in layers of this kind, in tokens; `None` where it has none."""
        return self.config.sliding_window if kind == "sliding_attention" else None

    def rope(self, x: torch.Tensor, position_ids: torch.Tensor, kind: str) -> Rope:
        """What attention layers of this kind get as `position_embeddings`, for positions `[B, T]`."""
        return self.model.rotary_emb(x, position_ids)

    def frequencies(self, kind: str) -> torch.Tensor | None:
        """RoPE's inverse frequencies in layers of this kind, radians per position; `None` where there is no RoPE."""
        return self.model.rotary_emb.inv_freq

    def shift_keys(self, keys: torch.Tensor, shift: torch.Tensor, kind: str) -> torch.Tensor:
        """Rotate cached keys `[B, H, T, D]` on by `shift` `[B]` positions (on the CPU), as RoPE would have."""
        frequencies = self.frequencies(kind)
        if frequencies is None:
            return keys
        # In float64 on the CPU: Apple's GPUs have none.
        angle = (shift.double().unsqueeze(1) * frequencies.cpu().double()).view(len(shift), 1, 1, -1)
        dtype = torch.promote_types(keys.dtype, torch.float32)
        cos, sin = (table.to(dtype).to(keys.device) for table in (angle.cos(), angle.sin()))
        half = angle.shape[-1]
        x, y, rest = keys.to(dtype).split((half, half, keys.shape[-1] - 2 * half), dim=-1)
        return torch.cat((x * cos - y * sin, y * cos + x * sin, rest), dim=-1).to(keys.dtype)

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

    def linear_layer(
        self, index: int, x: torch.Tensor, state: State, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, State]:
        """Run decoder layer `index`, one of the base's own linear-recurrent layers."""
        layer: Any = self.layers[index]

        def run(x: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
            mixed, state = self.mix(layer, layer.input_layernorm(x), state, lengths)
            x = x + mixed
            return x + layer.mlp(layer.post_attention_layernorm(x)), state

        return as_forward(layer, run, x, state)

    def mix(
        self, layer: Any, x: torch.Tensor, state: State, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, State]:
        """The mixer of a linear-recurrent decoder layer, on its normed input `[B, T, C]`."""
        raise NotImplementedError(f"{type(self).__name__} has no linear-recurrent layers")

    def linear_state(self, index: int, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The empty state of linear-recurrent layer `index`."""
        raise NotImplementedError(f"{type(self).__name__} has no linear-recurrent layers")

    def head_input(self, x: torch.Tensor) -> torch.Tensor:
        """Final norm, where the passes have not applied it: `[..., C]` to `[..., C]`."""
        return x if self.norm_every_pass else self.model.norm(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Final norm and head: `[..., C]` to `[..., vocab]`."""
        logits = self.lm.get_output_embeddings()(self.head_input(x))
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits


class PerKindRopeDecoder(Decoder):
    """Gemma 3 and OLMo 3: one RoPE per kind of layer."""

    def __init__(self, lm: PreTrainedModel):
        super().__init__(lm)
        if getattr(self.config, "use_bidirectional_attention", False):
            raise ValueError(
                "text_config.use_bidirectional_attention=True: such a model reads ahead, so it cannot sleep "
                "on what it has "
                "read; only causal decoders work"
            )

    def rope(self, x: torch.Tensor, position_ids: torch.Tensor, kind: str) -> Rope:
        return self.model.rotary_emb(x, position_ids, kind)

    def frequencies(self, kind: str) -> torch.Tensor | None:
        return getattr(self.model.rotary_emb, f"{kind}_inv_freq")


class HybridDecoder(Decoder):
    """A base with Gated DeltaNet layers of its own (`linear_attn`), which serve as fast weights.

    They run on `hf_sleep.ops` instead of the base's own recurrence, whose pads decay the state and whose cache is
    written in place: pads are exact, gradients reach earlier windows, and the numbers agree to float tolerance.
    """

    def project(self, mixer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[B, T, C]` to the convolution's input `[B, T, D]`, the gate `[B, T, H, V]`, β `[B, T, H]` and a `[B, T,
        H]`."""
        raise NotImplementedError

    def output(self, mixer: Any, o: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Gated norm and output projection: `[B, T, H, V]` to `[B, T, C]`."""
        width = o.shape[-1]
        normed = mixer.norm(o.reshape(-1, width), gate.reshape(-1, width))
        return mixer.out_proj(normed.reshape(*o.shape[:2], -1))

    def mix(
        self, layer: Any, x: torch.Tensor, state: State, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, State]:
        mixer: Any = layer.linear_attn
        recurrent_state, conv_state = state
        mixed, gate, beta, a = self.project(mixer, x)
        with loaded(mixer.conv1d):
            mixed, conv_state = short_convolution(mixed, mixer.conv1d.weight.squeeze(1), conv_state, lengths)
        q, k, v = F.silu(mixed).split((mixer.key_dim, mixer.key_dim, mixer.value_dim), dim=-1)
        groups = mixer.num_v_heads // mixer.num_k_heads
        q, k = (z.unflatten(-1, (mixer.num_k_heads, -1)).repeat_interleave(groups, dim=2) for z in (q, k))
        with loaded(mixer):
            g = -mixer.A_log.float().exp() * F.softplus(a.float() + mixer.dt_bias)
        o, recurrent_state = gated_delta_rule(
            q, k, v.unflatten(-1, (mixer.num_v_heads, -1)), g, beta, recurrent_state, lengths
        )
        return self.output(mixer, o, gate), (recurrent_state, conv_state)

    def linear_state(self, index: int, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        mixer: Any = self.layers[index].linear_attn
        shape = (batch_size, mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim)
        conv_shape = (batch_size, 2 * mixer.key_dim + mixer.value_dim, mixer.conv_kernel_size)
        high = torch.promote_types(dtype, torch.float32)
        return torch.zeros(shape, device=device, dtype=high), torch.zeros(conv_shape, device=device, dtype=dtype)


class Qwen3NextDecoder(HybridDecoder):
    """Qwen3-Next: q, k, v and gate in one projection, grouped by key head."""

    def project(self, mixer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, gate, b, a = mixer.fix_query_key_value_ordering(mixer.in_proj_qkvz(x), mixer.in_proj_ba(x))
        return torch.cat([z.flatten(2) for z in (q, k, v)], dim=-1), gate, b.sigmoid(), a


class Qwen35Decoder(HybridDecoder):
    """Qwen3.5 (text): separate projections for gate, β and decay; RoPE over three grids, which agree in text."""

    def rope(self, x: torch.Tensor, position_ids: torch.Tensor, kind: str) -> Rope:
        return super().rope(x, position_ids.expand(3, *position_ids.shape), kind)

    def project(self, mixer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        gate = mixer.in_proj_z(x).unflatten(-1, (mixer.num_v_heads, -1))
        return mixer.in_proj_qkv(x), gate, mixer.in_proj_b(x).sigmoid(), mixer.in_proj_a(x)


class OlmoHybridDecoder(HybridDecoder):
    """OLMo Hybrid: separate projections, β up to 2, and no RoPE in released checkpoints."""

    def rope(self, x: torch.Tensor, position_ids: torch.Tensor, kind: str) -> Rope:
        return None if self.model.rotary_emb is None else super().rope(x, position_ids, kind)

    def frequencies(self, kind: str) -> torch.Tensor | None:
        return None if self.model.rotary_emb is None else super().frequencies(kind)

    def project(self, mixer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        beta = mixer.b_proj(x).sigmoid() * (2.0 if mixer.allow_neg_eigval else 1.0)
        qkv = torch.cat((mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)), dim=-1)
        return qkv, mixer.g_proj(x).unflatten(-1, (mixer.num_v_heads, -1)), beta, mixer.a_proj(x)

    def output(self, mixer: Any, o: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        width = o.shape[-1]
        normed = mixer.o_norm(o.reshape(-1, width), gate.reshape(-1, width))
        return mixer.o_proj(normed.reshape(*o.shape[:2], -1))


class JetNemotronDecoder(Decoder):
    """Jet-Nemotron: its Jet layers are the fast weights, in the same mixer that a retrofit injects."""

    def mix(
        self, layer: Any, x: torch.Tensor, state: State, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, State]:
        return layer.self_attn(x, state, lengths)

    def linear_state(self, index: int, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        return self.layers[index].self_attn.init_state(batch_size, device, dtype)


class OuroDecoder(Decoder):
    """Ouro: wake is one of its loops, a sleep is N of them, each closed by the final norm as in its pre-training.

    `total_ut_steps` and the exit gate are left alone: how often the layers run is the sleep's to say.
    """

    norm_every_pass = True

    @property
    def base_loops(self) -> int:
        return self.config.total_ut_steps


DECODERS: dict[str, type[Decoder]] = {
    "llama": Decoder,
    "mistral": Decoder,
    "qwen2": Decoder,
    "qwen3": Decoder,
    "olmo2": Decoder,
    "olmo3": PerKindRopeDecoder,
    "gemma3_text": PerKindRopeDecoder,
    "qwen3_next": Qwen3NextDecoder,
    "qwen3_5_text": Qwen35Decoder,
    "olmo_hybrid": OlmoHybridDecoder,
    "jet_nemotron": JetNemotronDecoder,
    "ouro": OuroDecoder,
}


def decoder_for(lm: PreTrainedModel) -> Decoder:
    """The adapter for a base model.

    Args:
        lm: a causal LM of one of the families in `DECODERS`.

    Raises:
        ValueError: an unknown family, with what an adapter for it must say.
    """
    family = lm.config.model_type
    if family not in DECODERS:
        raise ValueError(
            f"no decoder adapter for model_type={family!r} (there is one for {', '.join(sorted(DECODERS))}). "
            "An adapter is a "
            "subclass of hf_sleep.decoders.Decoder, listed in DECODERS, that says how to embed ids, compute "
            "RoPE, run one "
            "decoder layer, read the base's own linear-recurrent layers if it has any, and compute logits"
        )
    return DECODERS[family](lm)
