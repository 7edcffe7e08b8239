"""Families with Mamba2 layers of their own: Granite 4 (`granitemoehybrid`) and Bamba."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..memory import FastWeights
from ..ops import short_convolution
from ..ops.mamba2 import mamba2
from ..placement import as_forward, loaded
from ..registry import register_base
from .decoder import Decoder, Rope
from .scales import GraniteDecoder


class Mamba2Decoder(Decoder):
    """A base with Mamba2 layers of its own (`mamba`), which serve as fast weights.

    They run on `hf_sleep.ops`. In the base's own scan pads decay the state, and the cache is written in place. Here
    pads are exact, gradients reach earlier windows, and the numbers agree to float tolerance.
    """

    recurrence_flops = 4
    """S is written, and read at C."""

    def add(self, layer: Any, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The rest of a decoder layer: its input and its mixer's output `[B, T, C]` to its output."""
        raise NotImplementedError

    def mixer(self, index: int) -> nn.Module:
        return self.layers[index].mamba

    def recurrent_layer(
        self, index: int, x: torch.Tensor, fast_weights: FastWeights, lengths: torch.Tensor | None, decays: bool
    ) -> tuple[torch.Tensor, FastWeights]:
        layer: Any = self.layers[index]

        def run(x: torch.Tensor, carried: FastWeights) -> tuple[torch.Tensor, FastWeights]:
            mixed, carried = self.mix(layer, layer.input_layernorm(x), carried, lengths, decays)
            return self.add(layer, x, mixed), carried

        x, carried = as_forward(layer, run, x, fast_weights)
        return x, FastWeights(*carried)

    def mix(
        self, layer: Any, x: torch.Tensor, fast_weights: FastWeights, lengths: torch.Tensor | None, decays: bool
    ) -> tuple[torch.Tensor, FastWeights]:
        mixer: Any = layer.mamba
        recurrent_state, conv_state = fast_weights
        gate, mixed, dt = mixer.in_proj(x).split((mixer.intermediate_size, mixer.conv_dim, mixer.num_heads), dim=-1)
        high = torch.promote_types(mixed.dtype, torch.float32)
        with loaded(mixer.conv1d):
            mixed, conv_state = short_convolution(mixed, mixer.conv1d.weight.squeeze(1), conv_state, lengths)
            if mixer.conv1d.bias is not None:
                mixed = mixed + mixer.conv1d.bias
        width = mixer.n_groups * mixer.ssm_state_size
        values, keys, queries = mixer.act(mixed).to(high).split((mixer.intermediate_size, width, width), dim=-1)
        with loaded(mixer):
            y, recurrent_state = mamba2(
                values.unflatten(-1, (mixer.num_heads, mixer.head_dim)),
                F.softplus(dt.to(high) + mixer.dt_bias).clamp(*mixer.time_step_limit),
                -mixer.A_log.to(high).exp() if decays else torch.zeros_like(mixer.A_log, dtype=high),
                keys.unflatten(-1, (mixer.n_groups, -1)),
                queries.unflatten(-1, (mixer.n_groups, -1)),
                mixer.D,
                recurrent_state,
                lengths,
            )
        return mixer.out_proj(mixer.norm(y.flatten(-2), gate).to(x.dtype)), FastWeights(recurrent_state, conv_state)

    def empty_fast_weights(self, index: int, batch_size: int, device: torch.device, dtype: torch.dtype) -> FastWeights:
        mixer: Any = self.layers[index].mamba
        shape = (batch_size, mixer.num_heads, mixer.ssm_state_size, mixer.head_dim)
        conv_shape = (batch_size, mixer.conv_dim, mixer.conv_kernel_size)
        recurrent_state = torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return FastWeights(recurrent_state, torch.zeros(conv_shape, device=device, dtype=dtype))


@register_base("granitemoehybrid")
class GraniteHybridDecoder(Mamba2Decoder, GraniteDecoder):
    """Granite 4: scaled as Granite is, experts beside a shared MLP, and RoPE in some checkpoints."""

    def rope(self, x: torch.Tensor, position_ids: torch.Tensor, kind: str) -> Rope:
        return None if self.model.rotary_emb is None else super().rope(x, position_ids, kind)

    def frequencies(self, kind: str) -> torch.Tensor | None:
        return None if self.model.rotary_emb is None else super().frequencies(kind)

    def add(self, layer: Any, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        x = x + mixed * layer.residual_multiplier
        normed = layer.post_attention_layernorm(x)
        out = layer.shared_mlp(normed)
        if layer.has_experts:
            out = layer.block_sparse_moe(normed) + out
        return x + out * layer.residual_multiplier


@register_base("bamba")
class BambaDecoder(Mamba2Decoder):
    """Bamba: other names for its norms and its MLP."""

    def attention_layer(
        self, index: int, x: torch.Tensor, rope: Rope, mask: torch.Tensor | None, kv: Any
    ) -> torch.Tensor:
        # Its layers return their attention weights too.
        return super().attention_layer(index, x, rope, mask, kv)[0]

    def add(self, layer: Any, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        x = x + mixed
        return x + layer.feed_forward(layer.pre_ff_layernorm(x))

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.final_layernorm(x)
