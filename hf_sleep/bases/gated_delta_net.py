"""Families with Gated DeltaNet layers of their own: Qwen3-Next, Qwen3.5 and OLMo Hybrid."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..memory import FastWeights
from ..ops import gated_delta_rule, short_convolution
from ..placement import loaded
from ..registry import register_base
from .decoder import Decoder, Rope


class HybridDecoder(Decoder):
    """A base with Gated DeltaNet layers of its own (`linear_attn`), which serve as fast weights.

    They run on `hf_sleep.ops`. In the base's own recurrence pads decay the state, and the cache is written in place.
    Here pads are exact, gradients reach earlier windows, and the numbers agree to float tolerance.
    """

    def project(self, mixer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project `[B, T, C]`.

        Returns:
            The convolution's input `[B, T, D]`, the gate `[B, T, H, V]`, β `[B, T, H]` and a `[B, T, H]`.
        """
        raise NotImplementedError

    def output(self, mixer: Any, o: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Gated norm and output projection: `[B, T, H, V]` to `[B, T, C]`."""
        width = o.shape[-1]
        normed = mixer.norm(o.reshape(-1, width), gate.reshape(-1, width))
        return mixer.out_proj(normed.reshape(*o.shape[:2], -1))

    def mixer(self, index: int) -> nn.Module:
        return self.layers[index].linear_attn

    def mix(
        self, layer: Any, x: torch.Tensor, fast_weights: FastWeights, lengths: torch.Tensor | None, decays: bool
    ) -> tuple[torch.Tensor, FastWeights]:
        mixer: Any = layer.linear_attn
        recurrent_state, conv_state = fast_weights
        mixed, gate, beta, a = self.project(mixer, x)
        with loaded(mixer.conv1d):
            mixed, conv_state = short_convolution(mixed, mixer.conv1d.weight.squeeze(1), conv_state, lengths)
        q, k, v = F.silu(mixed).split((mixer.key_dim, mixer.key_dim, mixer.value_dim), dim=-1)
        groups = mixer.num_v_heads // mixer.num_k_heads
        q, k = (z.unflatten(-1, (mixer.num_k_heads, -1)).repeat_interleave(groups, dim=2) for z in (q, k))
        with loaded(mixer):
            g = -mixer.A_log.float().exp() * F.softplus(a.float() + mixer.dt_bias)
            g = g if decays else torch.zeros_like(g)
        o, recurrent_state = gated_delta_rule(
            q, k, v.unflatten(-1, (mixer.num_v_heads, -1)), g, beta, recurrent_state, lengths
        )
        return self.output(mixer, o, gate), FastWeights(recurrent_state, conv_state)

    def empty_fast_weights(self, index: int, batch_size: int, device: torch.device, dtype: torch.dtype) -> FastWeights:
        mixer: Any = self.layers[index].linear_attn
        shape = (batch_size, mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim)
        conv_shape = (batch_size, 2 * mixer.key_dim + mixer.value_dim, mixer.conv_kernel_size)
        high = torch.promote_types(dtype, torch.float32)
        recurrent_state = torch.zeros(shape, device=device, dtype=high)
        return FastWeights(recurrent_state, torch.zeros(conv_shape, device=device, dtype=dtype))


@register_base("qwen3_next")
class Qwen3NextDecoder(HybridDecoder):
    """Qwen3-Next: q, k, v and gate in one projection, grouped by key head."""

    def project(self, mixer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, gate, b, a = mixer.fix_query_key_value_ordering(mixer.in_proj_qkvz(x), mixer.in_proj_ba(x))
        return torch.cat([z.flatten(2) for z in (q, k, v)], dim=-1), gate, b.sigmoid(), a


@register_base("qwen3_5_text")
class Qwen35Decoder(HybridDecoder):
    """Qwen3.5 (text): separate projections for gate, β and decay; RoPE over three grids, which agree in text."""

    def rope(self, x: torch.Tensor, position_ids: torch.Tensor, kind: str) -> Rope:
        return super().rope(x, position_ids.expand(3, *position_ids.shape), kind)

    def project(self, mixer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        gate = mixer.in_proj_z(x).unflatten(-1, (mixer.num_v_heads, -1))
        return mixer.in_proj_qkv(x), gate, mixer.in_proj_b(x).sigmoid(), mixer.in_proj_a(x)


@register_base("olmo_hybrid")
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
