"""Ouro's adapter: a sleep's passes are its loops."""

from transformers import PreTrainedConfig

from ...registry import register_base
from ..decoder import Decoder


@register_base("ouro")
class OuroDecoder(Decoder):
    """Ouro: wake is one of its loops, a sleep is N of them, each closed by the final norm as in its pre-training.

    `total_ut_steps` and the exit gate are left alone: how often the layers run is the sleep's to say.
    """

    norm_every_pass = True
    default_between = "none"

    @classmethod
    def default_loop_layers(cls, config: PreTrainedConfig) -> tuple[int, int]:
        """All of them, as in its pre-training."""
        return 0, config.num_hidden_layers

    @property
    def base_loops(self) -> int:
        return self.config.total_ut_steps
