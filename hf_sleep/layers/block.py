"""The fast-weight block that a retrofit injects between two decoder layers, and the contract of what it is made of."""

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init

from ..checks import is_whole
from ..memory import FastWeights
from ..placement import without_views
from ..registry import BLOCKS


class FastWeightMixer(nn.Module):
    """Contract of a fast-weight block's recurrence: it mixes tokens over time through a memory of fixed size.

    Subclass it, give it the methods below, and register it; `SleepConfig(block_kind="mine")` then injects it:

        @register_block("mine")
        class Mine(FastWeightMixer): ...

    Fast weights are values: `forward` makes new ones, writes none in place, and lets gradients through them. The last
    thing that it does is `o_proj`, a linear layer, which starts at zero: so a fresh block adds nothing to its base.

    Args:
        hidden_size: C, of the base.
        num_heads: H.
        head_dim: K, key width of a head.
        expand_v: V / K, value width of a head over its key width.
        conv_size: W, taps of the short convolution (tokens).

    Raises:
        ValueError: K times `expand_v` is no whole number.
    """

    o_proj: nn.Linear
    """Makes the output, `[..., H * V]` to `[..., C]`."""

    fp32_parameters: ClassVar[tuple[str, ...]] = ()
    """Names, without a path, of the parameters that stay fp32 at least, whatever the model's dtype."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, expand_v: float, conv_size: int):
        super().__init__()
        if not is_whole(head_dim * expand_v):
            raise ValueError(
                f"expand_v={expand_v} gives heads of {head_dim * expand_v} values; head_dim={head_dim} times expand_v "
                "must be a whole number"
            )
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.head_v_dim = round(head_dim * expand_v)
        self.conv_size = conv_size

    def empty(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> FastWeights:
        """The fast weights of a batch that has read nothing. `dtype` is the activations'."""
        raise NotImplementedError

    def forward(
        self,
        x: torch.Tensor,
        fast_weights: FastWeights,
        lengths: torch.Tensor | None = None,
        decays: bool = True,
    ) -> tuple[torch.Tensor, FastWeights]:
        """Mix over time.

        Args:
            x: `[B, T, C]`.
            fast_weights: what the tokens before left.
            lengths: integers `[B]`, real tokens per row. They come first; pads follow, and leave the fast weights
                exactly as they are. `None`: all T are real.
            decays: whether what was written before decays; false in passes 2 to N under `SleepConfig.decay_once`.

        Returns:
            The mixed `[B, T, C]`, and the fast weights after the last real token.
        """
        raise NotImplementedError

    def init_weights(self, std: float, generator: torch.Generator | None = None) -> None:
        """Set fresh parameters, with which `forward` returns exactly zero, but a gradient reaches the output.

        As it is, projections are N(0, std), and the output's is zero. Set others with `transformers.initialization`,
        which leaves those alone that were loaded.

        Args:
            std: of the projections.
            generator: to draw from; by default torch's own.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init.normal_(module.weight, std=std, generator=generator)
        init.zeros_(self.o_proj.weight)

    def init_half_lives(self, half_lives: torch.Tensor) -> None:
        """Set, after `init_weights`, how slowly each head forgets at first.

        As it is, it does nothing: for a mixer without a decay per head. Use `transformers.initialization`, as there.

        Args:
            half_lives: float64 `[H]` on the CPU, in tokens: where nothing is written, half of a head is left after so
                many.
        """

    @property
    def is_untrained(self) -> bool:
        """Tell whether `forward` is known to return zero. Reads parameters: call it rarely."""
        weight = self.o_proj.weight
        return not weight.is_meta and not bool(weight.any())

    def _apply(self, fn: Callable, recurse: bool = True) -> "FastWeightMixer":
        # .to(bfloat16), .half() and the like leave these what loading in that dtype leaves them: a rounded decay is
        # forgetting at another rate.
        kept = [p for name, p in self.named_parameters() if name.rpartition(".")[2] in self.fp32_parameters]
        return super()._apply(keeping(fn, kept), recurse)


class FastWeightBlock(nn.Module):
    """`x + mixer(norm(x))`, without an MLP; adds exactly zero until its output projection is trained.

    Args:
        kind: a name that a mixer is registered under: `"jet"`, `"gated_delta_net"`, or one of `@register_block`.
        hidden_size: C, of the base.
        num_heads: H.
        head_dim: K.
        expand_v: V / K.
        conv_size: W (tokens).
        norm_eps: of the input norm.
        half_lives: the shortest and the longest of a head at first (tokens), the others evenly spaced in the logarithm
            between them, and a single head's in the middle; `None`: as the mixer's `init_weights` sets them.

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
        half_lives: tuple[float, float] | None = None,
    ):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.mixer: FastWeightMixer = BLOCKS[kind](hidden_size, num_heads, head_dim, expand_v, conv_size)
        self.half_lives = half_lives

    def empty(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> FastWeights:
        """The fast weights of a batch that has read nothing. `dtype` is the activations'."""
        return self.mixer.empty(batch_size, device, dtype)

    def forward(
        self,
        x: torch.Tensor,
        fast_weights: FastWeights,
        lengths: torch.Tensor | None = None,
        decays: bool = True,
    ) -> tuple[torch.Tensor, FastWeights]:
        """Add what the mixer makes of `x` `[B, T, C]`; arguments and results as `FastWeightMixer.forward` has them."""
        mixed, fast_weights = self.mixer(self.norm(x), fast_weights, lengths, decays)
        return x + mixed, without_views(fast_weights) if torch.is_grad_enabled() else fast_weights

    def init_weights(self, std: float, generator: torch.Generator | None = None) -> None:
        """Set fresh weights, with the zero at the output, where the gradient still reaches it.

        Args:
            std: of the projections.
            generator: to draw from; by default torch's own.
        """
        self.mixer.init_weights(std, generator)
        if self.half_lives is not None:
            self.mixer.init_half_lives(spread(*self.half_lives, self.mixer.num_heads))
        init.ones_(self.norm.weight)

    @property
    def is_untrained(self) -> bool:
        """Tell whether the block is known to add nothing to the base. Reads its weights: call it rarely."""
        return self.mixer.is_untrained

    @property
    def fp32_parameters(self) -> tuple[str, ...]:
        """Names, without a path, of the parameters that stay fp32 at least, whatever the model's dtype."""
        return self.mixer.fp32_parameters


def spread(first: float, last: float, count: int) -> torch.Tensor:
    """Float64 `[count]` from `first` to `last`, evenly spaced in the logarithm; of one, the middle."""
    ratio = math.log(last) - math.log(first)
    places = [i / (count - 1) for i in range(count)] if count > 1 else [0.5]
    return torch.tensor([first * math.exp(ratio * place) for place in places], dtype=torch.float64, device="cpu")


def keeping(fn: Callable, tensors: Iterable[torch.Tensor]) -> Callable:
    """Make `fn`, as `nn.Module._apply` takes it, leave out the cast to 16 bits where it gets one of `tensors`."""
    kept = [t for tensor in tensors for t in (tensor, tensor.grad) if t is not None]

    def apply(t: torch.Tensor) -> Any:
        applied = fn(t)
        dtype = torch.promote_types(applied.dtype, torch.float32)
        if applied.dtype in (t.dtype, dtype) or not any(t is tensor for tensor in kept):
            return applied
        return t.to(applied.device, dtype)

    return apply
