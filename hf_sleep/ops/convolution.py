"""Short causal convolutions, with fixed taps or with taps of its own for every token."""

from typing import Any

import torch
from torch import Tensor

from .checks import check_convolution, compute_dtype, misfit, pad_mask, zero_pads


def short_convolution(
    x: Tensor, weight: Tensor, conv_state: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution with fixed taps: `y[t, d] = sum_w weight[d, w] * x[t + w - W + 1, d]`.

    Args:
        x: inputs `[B, T, D]`.
        weight: taps `[D, W]`; tap W - 1 is the current token's.
        conv_state: the W inputs before x, oldest first, `[B, D, W]`; `None` is zeros.
        lengths: integers `[B]`, real tokens per row, which come first. Pads read 0 and do not enter the state.

    Returns:
        `y` `[B, T, D]` and the new state `[B, D, W]`, the last W of (old state, real inputs), both in x's dtype.

    Raises:
        ValueError: a shape does not fit the others.
    """
    if x.dim() != 3 or x.shape[1] < 1:
        raise misfit("x", x, "[B, T, D] with at least one token")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise misfit("weight", weight, f"[D, W] with D = {x.shape[2]}")
    return _convolve(x, weight, conv_state, lengths)


def dynamic_short_convolution(
    x: Tensor, taps: Tensor, conv_state: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`short_convolution` with taps of its own for every token: `y[t, d] = sum_w taps[t, d, w] * x[t + w - W + 1, d]`.

    Args:
        x: inputs `[B, T, D]`.
        taps: `[B, T, D, W]`; tap W - 1 is the current token's.
        conv_state: the W inputs before x, oldest first, `[B, D, W]`; `None` is zeros.
        lengths: integers `[B]`, real tokens per row, which come first. Pads read 0 and do not enter the state.

    Returns:
        `y` `[B, T, D]` and the new state `[B, D, W]`, the last W of (old state, real inputs), both in x's dtype.

    Raises:
        ValueError: a shape does not fit the others.

    Source: Gu et al. 2025, Jet-Nemotron (arXiv 2508.15884).
    """
    if x.dim() != 3 or x.shape[1] < 1:
        raise misfit("x", x, "[B, T, D] with at least one token")
    if taps.dim() != 4 or taps.shape[:3] != x.shape:
        raise misfit("taps", taps, f"[B, T, D, W] with [B, T, D] = {list(x.shape)}")
    return _convolve(x, taps, conv_state, lengths)


def _convolve(x: Tensor, taps: Tensor, conv_state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = x.shape
    width = taps.shape[-1]
    check_convolution(x, conv_state, width, lengths)
    if conv_state is None:
        conv_state = x.new_zeros(batch, channels, width)
    if lengths is None and tokens == 1:
        state = torch.cat([conv_state[..., 1:].to(x.dtype), x.mT], -1)
        products = state.to(compute_dtype(x)) * (taps if taps.dim() == 2 else taps.squeeze(1))
        return products.sum(-1).to(x.dtype).unsqueeze(1), state
    pad = pad_mask(lengths, tokens, x.device)
    if taps.dim() == 4:
        taps = zero_pads(taps, pad)
    past = torch.cat([conv_state.to(x.dtype).mT, zero_pads(x, pad)], 1)
    y = zero_pads(_Convolution.apply(past, taps), pad)
    if lengths is None:
        return y, past[:, tokens:].mT.contiguous()
    last = lengths.to(x.device)[:, None] + torch.arange(width, device=x.device)
    return y, past.gather(1, last[:, :, None].expand(-1, -1, channels)).mT.contiguous()


class _Convolution(torch.autograd.Function):
    """`y[t] = sum_w taps[(t,) d, w] * past[t + w + 1]` for `past` `[B, W + T, D]`, added up in fp32 or fp64.

    By hand, because autograd would give each of the W slices of `past` a gradient as large as all of it.
    """

    @staticmethod
    def forward(ctx: Any, past: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(past, taps)
        dtype, width = compute_dtype(past), taps.shape[-1]
        tokens = past.shape[1] - width
        inputs, taps = past.to(dtype), taps.to(dtype)
        y = inputs[:, 1 : 1 + tokens] * taps[..., 0]
        for w in range(1, width):
            y.addcmul_(inputs[:, w + 1 : w + 1 + tokens], taps[..., w])
        return y.to(past.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        past, taps = ctx.saved_tensors
        dtype, width, tokens = compute_dtype(past), taps.shape[-1], dy.shape[1]
        dy, inputs, weights = dy.to(dtype), past.to(dtype), taps.to(dtype)
        dpast = torch.zeros_like(inputs)
        for w in range(width):
            dpast[:, w + 1 : w + 1 + tokens].addcmul_(dy, weights[..., w])
        if taps.dim() == 4:
            dtaps = dy[..., None] * inputs[:, 1:].unfold(1, width, 1)
        else:
            products = torch.empty_like(dy)
            slices = [inputs[:, w + 1 : w + 1 + tokens] for w in range(width)]
            dtaps = torch.stack([torch.mul(dy, x, out=products).sum((0, 1)) for x in slices], -1)
        return dpast.to(past.dtype), dtaps.to(taps.dtype)
