"""Families whose layers differ from Llama's in their positions alone."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

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


@register_base("gpt_oss")
class HalfTablesDecoder(Decoder):
    """gpt-oss: cos and sin stand once for both channels that turn together."""

    def rope_width(self, kind: str) -> int | None:
        return len(self.model.rotary_emb.inv_freq)


@register_base("glm", "glm4", "helium", "ernie4_5")
class InterleavedRopeDecoder(Decoder):
    """GLM, Helium and Ernie 4.5: RoPE turns neighbouring channels."""

    interleaved_rope = True


WITHOUT_ROPE = "_without_rope"


class PartlyRotatedDecoder(Decoder):
    """Some layers have no positions at all: those of a kind that ends in `WITHOUT_ROPE`.

    Such layers are given RoPE's tables as the others are, and leave them alone.
    """

    @classmethod
    def layer_kinds(cls, config: PreTrainedConfig) -> list[str]:
        kinds = super().layer_kinds(config)
        return [kind if cls.rotates(config, i) else kind + WITHOUT_ROPE for i, kind in enumerate(kinds)]

    @classmethod
    def rotates(cls, config: PreTrainedConfig, index: int) -> bool:
        """Tell whether layer `index` applies RoPE: by default those with an attention window of their own."""
        return config.sliding_window is None or config.layer_types[index] == "sliding_attention"

    def own_window(self, kind: str) -> int | None:
        return super().own_window(kind.removesuffix(WITHOUT_ROPE))

    def frequencies(self, kind: str) -> torch.Tensor | None:
        return None if kind.endswith(WITHOUT_ROPE) else super().frequencies(kind)

    def rope_width(self, kind: str) -> int | None:
        return super().rope_width(kind.removesuffix(WITHOUT_ROPE))


register_base("exaone4")(PartlyRotatedDecoder)


@register_base("smollm3")
class SmolLM3Decoder(PartlyRotatedDecoder):
    """SmolLM3: the config lists the layers with RoPE."""

    @classmethod
    def rotates(cls, config: PreTrainedConfig, index: int) -> bool:
        return bool(config.no_rope_layers[index])
