"""Kimi Delta Attention: the gated delta rule with a decay of its own for every channel of the keys.

Shapes are `[B, T, H, K]` (rows, tokens, heads, key width) and `[B, T, H, V]` throughout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_delta_rule, compute_dtype, in_chunks, misfit, no_autocast, pad_mask, zero_pads
from .chunked import NORM_EPS

_CHUNK = 32


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write T tokens into the fast weights of every head, and read each token's output from them.

    Per head, with q and k L2-normalised as `z / sqrt(sum z^2 + 1e-6)` and q scaled by `K ** -0.5`:
    `S <- diag(exp(g)) S`; `u = beta * (v - S^T k)`; `S <- S + k u^T`; `o = S^T q`. Computed in fp32, fp64 inputs in
    fp64, also under autocast. Nothing is changed in place, and all six tensors get gradients, through both results.

    Args:
        q: queries `[B, T, H, K]`.
        k: keys `[B, T, H, K]`.
        v: values `[B, T, H, V]`.
        g: log of the decay of every channel, `[B, T, H, K]`, at most 0.
        beta: writing strength, `[B, T, H]`.
        initial_state: `[B, H, K, V]`; `None` is zeros.
        lengths: integers `[B]`, real tokens per row. They come first; the rest are pads, which leave the state exactly
            as it is, read 0, and get zero gradients, whatever they hold. `None`: all T are real.

    Returns:
        `o` `[B, T, H, V]` in v's dtype, and the state after the last real token `[B, H, K, V]`, fp32 or fp64.

    Raises:
        ValueError: a shape does not fit the others.

    Source: Kimi Team 2025, Kimi Linear (arXiv 2510.26692), Eq. 1.
    """
    form = step_kda if q.dim() == 4 and q.shape[1] == 1 else chunk_kda
    return form(q, k, v, g, beta, initial_state, lengths)


def naive_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`kda` token by token, as its formula reads: the judge of the others.

    Source: Kimi Team 2025, Kimi Linear (arXiv 2510.26692), Eq. 1.
    """
    check_delta_rule(q, k, v, g, beta, initial_state, lengths, decays_channels=True)
    out_dtype = v.dtype
    with no_autocast(q.device):
        q, k, v, g, beta, state = _prepared(q, k, v, g, beta, initial_state, lengths)
        outputs = []
        for t in range(q.shape[1]):
            state = state * g[:, t, :, :, None].exp()
            u = beta[:, t, :, None] * (v[:, t] - (state * k[:, t, :, :, None]).sum(-2))
            state = state + k[:, t, :, :, None] * u[:, :, None, :]
            outputs.append((state * q[:, t, :, :, None]).sum(-2))
        return torch.stack(outputs, 1).to(out_dtype), state


def step_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`kda` of a single token, for decoding: few calls, because calls are what a decode step costs.

    Raises:
        ValueError: a shape does not fit the others, or T is not 1.
    """
    check_delta_rule(q, k, v, g, beta, initial_state, lengths, decays_channels=True)
    if q.shape[1] != 1:
        raise misfit("q", q, "[B, 1, H, K], because step_kda reads one token")
    out_dtype = v.dtype
    with no_autocast(q.device):
        q, k, v, g, beta, state = _prepared(q, k, v, g, beta, initial_state, lengths)
        # Each head's row vectors, `[B * H, 1, ...]`.
        q, k, v, g, beta = (z.reshape(state.shape[0] * state.shape[1], 1, -1) for z in (q, k, v, g, beta))
        shape = state.shape
        state = state.flatten(0, 1) * g.mT.exp()
        u = torch.baddbmm(v, k, state, alpha=-1) * beta
        state = torch.baddbmm(state, k.mT, u)
        o = torch.bmm(q, state)
    return o.view(shape[0], 1, shape[1], -1).to(out_dtype), state.view(shape)


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`kda` in chunks of tokens: matrix products inside a chunk, a short scan over chunks for the state.

    Raises:
        ValueError: a shape does not fit the others.

    Source: Kimi Team 2025, Kimi Linear (arXiv 2510.26692), §3.1; how decays are kept from overflowing is our own.
    """
    check_delta_rule(q, k, v, g, beta, initial_state, lengths, decays_channels=True)
    tokens, key_dim, value_dim, out_dtype = q.shape[1], q.shape[3], v.shape[3], v.dtype
    size = min(_CHUNK, 1 << (tokens - 1).bit_length())
    with no_autocast(q.device):
        *inputs, beta, state = _prepared(q, k, v, g, beta, initial_state, lengths)
        q, k, v, g, beta = (in_chunks(z, size) for z in (*inputs, beta[..., None]))
        kept, last = g.cumsum(-2).exp(), _sums_after(g).exp()
        scores = _scores(torch.stack([q, k]), k, g)
        # Row i: u_i + beta_i sum_j<i (k_i . k_j) u_j = beta_i (v_i - S^T k_i), with the decays in between.
        targets = torch.cat([v, k * kept], -1) * beta
        solved = torch.linalg.solve_triangular(scores[1] * beta, targets, upper=False, unitriangular=True)
        written, erased = solved.split([value_dim, key_dim], -1)
        states, us = [], []
        chunks = (z.unbind(1) for z in (written, erased, (k * last).mT, kept[..., -1, :, None]))
        for written_i, erased_i, keys_i, kept_i in zip(*chunks, strict=True):
            states.append(state)
            us.append(written_i - erased_i @ state)
            state = state * kept_i + keys_i @ us[-1]
        o = (q * kept) @ torch.stack(states, 1) + scores[0] @ torch.stack(us, 1)
        return o.transpose(2, 3).flatten(1, 2)[:, :tokens].to(out_dtype), state


def _scores(rows: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """`rows_i . k_j` with the decay between j and i, for j <= i within a chunk; 0 elsewhere.

    No difference of running sums of g is taken, since one of them would overflow in exp: the tokens of a chunk are
    halved again and again, and each half meets the half before it by the decays up to the boundary between them.

    Args:
        rows: `[R, B, chunks, H, c, K]`, c a power of two.
        k: `[B, chunks, H, c, K]`.
        g: log of the decay, as k.

    Returns:
        `[R, B, chunks, H, c, c]`.
    """
    size = k.shape[-2]
    # Blocks on the diagonal, [R, B, chunks, H, c / width, width, width]: of one token each, then of ever more.
    blocks, width = (rows * k).sum(-1)[..., None, None], 1
    while width < size:
        halves = (-1, 2, width)
        g_first, g_second = g.unflatten(-2, halves).unbind(-3)
        later = rows.unflatten(-2, halves)[..., 1, :, :] * g_second.cumsum(-2).exp()
        earlier = k.unflatten(-2, halves)[..., 0, :, :] * _sums_after(g_first).exp()
        across = later @ earlier.mT
        first, second = blocks.unflatten(-3, (-1, 2)).unbind(-3)
        blocks = torch.cat(
            [torch.cat([first, torch.zeros_like(across)], -1), torch.cat([across, second], -1)],
            -2,
        )
        width *= 2
    return blocks.squeeze(-3)


def _sums_after(g: Tensor) -> Tensor:
    """Sum g `[..., c, K]` over the tokens after each one."""
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, ...]:
    """All inputs in the dtype that is computed in, q and k normalised, with zeros at pads: those change nothing."""
    dtype, pad = compute_dtype(q, k, v), pad_mask(lengths, q.shape[1], q.device)
    if initial_state is None:
        initial_state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[3], dtype=dtype)
    q, k, v, g, beta = (zero_pads(z, pad).to(dtype) for z in (q, k, v, g, beta))
    q, k = (z * (z.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt() for z in (q, k))
    return q * q.shape[-1] ** -0.5, k, v, g, beta, initial_state.to(dtype)
