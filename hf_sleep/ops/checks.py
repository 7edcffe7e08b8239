"""Shapes, pads, chunks and dtypes: the operators' common ground."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor


def misfit(name: str, x: Tensor, what_works: str) -> ValueError:
    """Make the error of a tensor whose shape does not fit, to be raised."""
    return ValueError(f"{name} has shape {tuple(x.shape)}: it must be {what_works}")


def check_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    decays_channels: bool = False,
) -> None:
    """Raise `ValueError` unless the inputs of a gated delta rule fit each other; shapes as it documents them.

    With `decays_channels`, g is `[B, T, H, K]`, a decay for every channel of the keys, and not `[B, T, H]`.
    """
    if q.dim() != 4 or q.shape[1] < 1:
        raise misfit("q", q, "[B, T, H, K] with at least one token")
    batch, tokens, heads, key_dim = q.shape
    if k.shape != q.shape:
        raise misfit("k", k, f"[B, T, H, K] like q, {list(q.shape)}")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise misfit("v", v, f"[B, T, H, V] with [B, T, H] = {[batch, tokens, heads]}")
    if decays_channels and g.shape != q.shape:
        raise misfit("g", g, f"[B, T, H, K] like q, {list(q.shape)}")
    if not decays_channels and g.shape != q.shape[:3]:
        raise misfit("g", g, f"[B, T, H] = {[batch, tokens, heads]}")
    if beta.shape != q.shape[:3]:
        raise misfit("beta", beta, f"[B, T, H] = {[batch, tokens, heads]}")
    state_shape = (batch, heads, key_dim, v.shape[3])
    if initial_state is not None and initial_state.shape != state_shape:
        raise misfit("initial_state", initial_state, f"[B, H, K, V] = {list(state_shape)}")
    check_lengths(lengths, batch)


def check_convolution(x: Tensor, conv_state: Tensor | None, width: int, lengths: Tensor | None) -> None:
    """Raise `ValueError` unless `conv_state` and `lengths` fit `x` `[B, T, D]` and taps of that width W."""
    state_shape = (x.shape[0], x.shape[2], width)
    if conv_state is not None and conv_state.shape != state_shape:
        raise misfit("conv_state", conv_state, f"[B, D, W] = {list(state_shape)}")
    check_lengths(lengths, x.shape[0])


def check_lengths(lengths: Tensor | None, batch: int) -> None:
    """Raise `ValueError` unless `lengths` is `[B]`, or `None`."""
    if lengths is not None and lengths.shape != (batch,):
        raise misfit("lengths", lengths, f"[B] = {[batch]}, the real tokens of each row")


def pad_mask(lengths: Tensor | None, tokens: int, device: torch.device) -> Tensor | None:
    """`[B, T]`, True at pads; `None` if there are none, as far as can be told without waiting for a GPU."""
    if lengths is None or (lengths.device.type == "cpu" and bool((lengths >= tokens).all())):
        return None
    return torch.arange(tokens, device=device) >= lengths.to(device)[:, None]


def zero_pads(x: Tensor, pad: Tensor | None) -> Tensor:
    """`x` `[B, T, ...]` with zeros where `pad`; a product would let the NaN of a pad through."""
    if pad is None:
        return x
    return x.masked_fill(pad.reshape(pad.shape + (1,) * (x.dim() - 2)), 0)


def in_chunks(z: Tensor, size: int) -> Tensor:
    """Cut `[B, T, H, D]` into chunks of c = `size` tokens, `[B, chunks, H, c, D]`, with zeros after the last token."""
    return F.pad(z, (0, 0, 0, 0, 0, -z.shape[1] % size)).unflatten(1, (-1, size)).transpose(2, 3)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: fp64 where one of `tensors` is, else fp32."""
    for x in tensors:
        if x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Switch autocast off on `device`, so that what was cast stays cast."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
