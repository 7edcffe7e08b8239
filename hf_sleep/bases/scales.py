"""Families that scale their embeddings or logits, or drop of the former."""

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

from ..registry import register_base
from .decoder import Decoder
from .rope import PartlyRotatedDecoder


@register_base("granite", "granitemoe")
class GraniteDecoder(Decoder):
    """Granite: both are scaled; what scales the residual stream is in its layers."""

    def first_input(self, embeds: torch.Tensor) -> torch.Tensor:
        return super().first_input(embeds) * self.config.embedding_multiplier

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return super().logits(x) / self.config.logits_scaling


@register_base("cohere")
class CohereDecoder(Decoder):
    """Command R: scaled logits, and RoPE that turns neighbouring channels."""

    interleaved_rope = True

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return super().logits(x) * self.config.logit_scale


@register_base("cohere2")
class Cohere2Decoder(CohereDecoder, PartlyRotatedDecoder):
    """Command R7B: RoPE in its sliding layers alone."""

    @classmethod
    def rotates(cls, config: PreTrainedConfig, index: int) -> bool:
        return config.layer_types[index] == "sliding_attention"


@register_base("starcoder2")
class DroppedEmbeddingsDecoder(Decoder):
    """StarCoder 2: in training, embeddings go through dropout."""

    def first_input(self, embeds: torch.Tensor) -> torch.Tensor:
        return F.dropout(embeds, p=self.config.embedding_dropout, training=self.model.training)
