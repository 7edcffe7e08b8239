"""Kimi Linear: layers of Kimi Delta Attention, and latent attention without positions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from ..memory import KV, FastWeights
from ..ops import short_convolution
from ..ops.kda import kda
from ..placement import loaded
from ..registry import register_base
from .decoder import Decoder, Rope


@register_base("kimi_linear")
class KimiLinearDecoder(Decoder):
    """Kimi Linear: its Kimi Delta Attention layers are the fast weights.

    They run on `hf_sleep.ops`. In the base's own recurrence pads decay the state, and the cache is written in place.
    Here pads are exact, gradients reach earlier windows, and the numbers agree to float tolerance.

    Its attention layers cache what they expand to keys and values: a latent `[B, 1, T, R]`, and the part of the keys
    that all heads share, `[B, 1, T, D]`. There is no RoPE, so a sleep turns nothing.
    """

    def rope(self, x: torch.Tensor, position_ids: torch.Tensor, kind: str) -> Rope:
        return None

    def frequencies(self, kind: str) -> torch.Tensor | None:
        return None

    def attention_flops(self, index: int, tokens: int, keys: int, kv: KV) -> int:
        attention: Any = self.layers[index].self_attn
        met = tokens * attention.num_heads * (attention.qk_head_dim + attention.v_head_dim)
        # The latents of earlier tokens are expanded again.
        return 2 * keys * met + 2 * (keys - tokens) * attention.kv_b_proj.weight.numel()

    def mixer(self, index: int) -> nn.Module:
        return self.layers[index].self_attn

    def mix(
        self, layer: Any, x: torch.Tensor, fast_weights: FastWeights, lengths: torch.Tensor | None, decays: bool
    ) -> tuple[torch.Tensor, FastWeights]:
        mixer: Any = layer.self_attn
        recurrent_state, conv_state = fast_weights
        qkv = torch.cat((mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)), dim=-1)
        with loaded(mixer.conv1d):
            qkv, conv_state = short_convolution(qkv, mixer.conv1d.weight.squeeze(1), conv_state, lengths)
        q, k, v = ACT2FN[mixer.activation](qkv).unflatten(-1, (3, mixer.num_heads, mixer.head_dim)).unbind(-3)
        g, beta = self.decay(mixer.forget_gate, x), mixer.b_proj(x).sigmoid()
        g = g if decays else torch.zeros_like(g)
        o, recurrent_state = kda(q, k, v, g, beta, recurrent_state, lengths)
        gate = mixer.g_b_proj(mixer.g_a_proj(x)).view_as(o)
        return mixer.o_proj(mixer.o_norm(o, gate).flatten(-2)), FastWeights(recurrent_state, conv_state)

    def decay(self, gate: Any, x: torch.Tensor) -> torch.Tensor:
        """Log of the decay of every channel, `[B, T, C]` to `[B, T, H, K]`, at least fp32."""
        f = gate.f_b_proj(gate.f_a_proj(x))
        f = f.to(torch.promote_types(f.dtype, torch.float32))
        with loaded(gate):
            # Not the gate's own forward: its softplus has no gradient where exp overflows.
            steps = F.softplus(f + gate.dt_bias).unflatten(-1, (gate.num_heads, gate.head_dim))
            return -gate.A_log.to(f.dtype).exp() * steps

    def empty_fast_weights(self, index: int, batch_size: int, device: torch.device, dtype: torch.dtype) -> FastWeights:
        mixer: Any = self.layers[index].self_attn
        shape = (batch_size, mixer.num_heads, mixer.head_dim, mixer.head_dim)
        conv_shape = (batch_size, mixer.conv_dim, mixer.conv_kernel_size)
        recurrent_state = torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return FastWeights(recurrent_state, torch.zeros(conv_shape, device=device, dtype=dtype))
