"""The fast-weight block that a retrofit injects between two decoder layers."""

import torch
from torch import nn
from transformers import initialization as init

from .gated_delta_net import GatedDeltaNet
from .jet import Jet
from .recurrence import State

MIXERS = {"jet": Jet, "gated_delta_net": GatedDeltaNet}


class FastWeightBlock(nn.Module):
    """`x + mixer(norm(x))`, without an MLP; adds exactly zero until its output projection is trained.

    Args:
        kind: `"jet"` or `"gated_delta_net"`.
        hidden_size: C, of the base.
        num_heads: H.
        head_dim: K.
        expand_v: V / K.
        conv_size: W (tokens).
        norm_eps: of the input norm.

    Source: Lee et al. 2026, §4 (Jet layers without MLP inserted into Ouro).
    """

    def __init__(
        self,
        kind: str,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        expand_v: float,
        conv_size: int,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.mixer = MIXERS[kind](hidden_size, num_heads, head_dim, expand_v, conv_size)

    def forward(self, x: torch.Tensor, state: State, lengths: torch.Tensor | None = None) -> tuple[torch.Tensor, State]:
        """`x` `[B, T, C]`, the layer's `State`, `lengths` `[B]` or `None`: the new `[B, T, C]` and `State`."""
        mixed, state = self.mixer(self.norm(x), state, lengths)
        return x + mixed, state

    @property
    def is_untrained(self) -> bool:
        """Whether the block is known to add nothing to the base. Reads its weights: call it rarely."""
        weight = self.mixer.o_proj.weight
        return not weight.is_meta and not bool(weight.any())

    def init_weights(self, std: float, generator: torch.Generator | None = None) -> None:
        """Fresh weights with the zero at the output, where the gradient still reaches it.

        Args:
            std: of the projections.
            generator: to draw from; by default torch's own.
        """
        self.mixer.init_weights(std, generator)
        init.ones_(self.norm.weight)
        init.zeros_(self.mixer.o_proj.weight)
