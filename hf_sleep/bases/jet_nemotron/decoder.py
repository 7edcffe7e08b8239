"""Jet-Nemotron's adapter: its Jet layers are the fast weights."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ...memory import FastWeights
from ...registry import register_base
from ..decoder import Decoder


@register_base("jet_nemotron")
class JetNemotronDecoder(Decoder):
    """Jet-Nemotron, whose Jet layers have the same mixer that a retrofit injects."""

    default_between = "none"

    @classmethod
    def default_loop_layers(cls, config: PreTrainedConfig) -> tuple[int, int]:
        """The middle half.

        Source: Lee et al. 2026 (arXiv 2605.26099), which loops the middle 14 of the 2B model's 28 layers.
        """
        quarter = config.num_hidden_layers // 4
        return quarter, config.num_hidden_layers - quarter

    def mixer(self, index: int) -> nn.Module:
        return self.layers[index].self_attn

    def mix(
        self, layer: Any, x: torch.Tensor, fast_weights: FastWeights, lengths: torch.Tensor | None, decays: bool
    ) -> tuple[torch.Tensor, FastWeights]:
        return layer.self_attn(x, fast_weights, lengths, decays)

    def empty_fast_weights(self, index: int, batch_size: int, device: torch.device, dtype: torch.dtype) -> FastWeights:
        return self.layers[index].self_attn.empty(batch_size, device, dtype)
