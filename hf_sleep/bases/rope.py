"""Families whose layers differ from Llama's in their positions alone."""

import torch
from transformers import PreTrainedModel

from ..registry import register_base
from .decoder import Decoder, Rope


@register_base("olmo3", "gemma3_text")
class PerKindRopeDecoder(Decoder):
    """Gemma 3 and OLMo 3: one RoPE per kind of layer."""

    def __init__(self, lm: PreTrainedModel):
        super().__init__(lm)
        if getattr(self.config, "use_bidirectional_attention", False):
            raise ValueError(
                "text_config.use_bidirectional_attention=True: such a model reads ahead, so it cannot sleep on what it "
                "has read; only causal decoders work"
            )

    def rope(self, x: torch.Tensor, position_ids: torch.Tensor, kind: str) -> Rope:
        return self.model.rotary_emb(x, position_ids, kind)

    def frequencies(self, kind: str) -> torch.Tensor | None:
        return getattr(self.model.rotary_emb, f"{kind}_inv_freq")
