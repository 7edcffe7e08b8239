"""What happens between two passes of a sleep.

To add something, subclass `Between` and register it with `@register_between("name")`.
"""

from typing import ClassVar

import torch
from torch import nn
from transformers import initialization as init

from ..registry import register_between


class Between(nn.Module):
    """The contract: what the looped layers read in the next pass, made of what they wrote in the last.

    Its parameters are the model's: saved, loaded and trained with it.

    Args:
        hidden_size: C, of the base.
    """

    needs_loop_input: ClassVar[bool] = False
    """Whether `forward` gets what pass 1 read. A memory then keeps it too: `[B, L, C]` more."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_size = hidden_size

    def forward(self, z: torch.Tensor, e: torch.Tensor | None) -> torch.Tensor:
        """Make the next pass's input.

        Args:
            z: `[B, T, C]`, what the last pass made of the window.
            e: `[B, T, C]`, what pass 1 read; `None` where `needs_loop_input` is false.

        Returns:
            `[B, T, C]`.
        """
        raise NotImplementedError

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fresh parameters, of which an untrained model has to stay the base."""


@register_between("none")
class Nothing(Between):
    """Nothing: a pass reads what the last one wrote.

    Source: Lee et al. 2026 (arXiv 2605.26099), Alg. 1.
    """

    def forward(self, z: torch.Tensor, e: torch.Tensor | None) -> torch.Tensor:
        return z


@register_between("gate")
class Gate(Between):
    """A gate per channel: the next pass reads `e + gate * (z - e)`, at first just `e`.

    An untrained pass then repeats the one before, whatever N, and none is ever far from what its layers were trained
    to read. `gate` is `[C]`. `SleepTrainer` trains it at a rate of its own, without weight decay.

    Source: ours; a gate near the identity as in LoopUS (arXiv 2605.11011).
    """

    needs_loop_input = True

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size)
        self.gate = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, z: torch.Tensor, e: torch.Tensor | None) -> torch.Tensor:
        assert e is not None  # needs_loop_input
        # In 16 bits the difference of two large activations may overflow.
        high = torch.promote_types(z.dtype, torch.float32)
        start = e.to(high)
        return (start + self.gate.to(z.device, high) * (z.to(high) - start)).to(z.dtype)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        init.zeros_(self.gate)
