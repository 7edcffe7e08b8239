"""Mamba2's state space duality: decay by one number per head and token, write an outer product, read it.

Shapes are `[B, T, H, V]` (rows, tokens, heads, value width) and `[B, T, G, K]` (groups of heads that share keys). In
the words of linear attention B are keys, C queries and `dt * x` values, so that the state is `[B, H, K, V]` as it is of
the other operators. Mamba's own layout `[B, H, P, N]` is its transpose, P = V and N = K.
"""

import torch
from torch import Tensor

from .checks import check_lengths, compute_dtype, in_chunks, misfit, no_autocast, pad_mask, zero_pads

_CHUNK = 64


def mamba2(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write T tokens into the fast weights of every head, and read each token's output from them.

    Per head: `S <- exp(dt A) S + B (dt x)^T`; `y = S^T C + D x`. Computed in fp32, fp64 inputs in fp64, also under
    autocast. Nothing is changed in place, and all seven tensors get gradients, through both results.

    Args:
        x: values `[B, T, H, V]`.
        dt: time steps `[B, T, H]`, at least 0: after bias, softplus and clamp.
        A: rate of decay per head, `[H]`, at most 0.
        B: keys `[B, T, G, K]`; head h takes those of group `h * G // H`.
        C: queries `[B, T, G, K]`.
        D: share of a token's own value in its output, per head, `[H]`.
        initial_state: `[B, H, K, V]`; `None` is zeros.
        lengths: integers `[B]`, real tokens per row. They come first; the rest are pads, which leave the state exactly
            as it is, read 0, and get zero gradients, whatever they hold. `None`: all T are real.

    Returns:
        `y` `[B, T, H, V]` in x's dtype, and the state after the last real token `[B, H, K, V]`, fp32 or fp64.

    Raises:
        ValueError: a shape does not fit the others.

    Source: Dao & Gu 2024 (arXiv 2405.21060), §2 and §6; Lee et al. 2026 (arXiv 2605.26099), Eq. 3.
    """
    form = step_mamba2 if x.dim() == 4 and x.shape[1] == 1 else chunk_mamba2
    return form(x, dt, A, B, C, D, initial_state, lengths)


def naive_mamba2(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mamba2` token by token, as its formula reads: the judge of the others.

    Source: Dao & Gu 2024 (arXiv 2405.21060), §2.
    """
    _check(x, dt, A, B, C, D, initial_state, lengths)
    out_dtype, pad, groups = x.dtype, pad_mask(lengths, x.shape[1], x.device), x.shape[2] // B.shape[2]
    with no_autocast(x.device):
        x, dt, A, B, C, D, state = _prepared(x, dt, A, B, C, D, initial_state, pad)
        B, C = (z.repeat_interleave(groups, dim=2) for z in (B, C))
        outputs = []
        for t in range(x.shape[1]):
            state = state * (dt[:, t] * A).exp()[..., None, None]
            state = state + B[:, t, :, :, None] * (dt[:, t, :, None] * x[:, t])[:, :, None, :]
            outputs.append((state * C[:, t, :, :, None]).sum(-2) + D[:, None] * x[:, t])
        return torch.stack(outputs, 1).to(out_dtype), state


def step_mamba2(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mamba2` of a single token, for decoding: few calls, because calls are what a decode step costs.

    Raises:
        ValueError: a shape does not fit the others, or T is not 1.
    """
    _check(x, dt, A, B, C, D, initial_state, lengths)
    if x.shape[1] != 1:
        raise misfit("x", x, "[B, 1, H, V], because step_mamba2 reads one token")
    out_dtype, pad = x.dtype, pad_mask(lengths, 1, x.device)
    with no_autocast(x.device):
        x, dt, A, B, C, D, state = _prepared(x, dt, A, B, C, D, initial_state, pad)
        kept = (dt * A).exp().view(*dt.shape[::2], 1, 1)
        # Heads of a group stand beside each other, so that they share its key and its query: [B, G, K, H / G, V].
        values = (dt[..., None] * x).view(x.shape[0], B.shape[2], 1, -1, x.shape[3])
        writes = (B.view(*B.shape[::2], -1, 1, 1) * values).transpose(2, 3)
        state = torch.addcmul(writes.flatten(1, 2), state, kept)
        y = (state.unflatten(1, (B.shape[2], -1)) * C.view(*C.shape[::2], 1, -1, 1)).sum(-2)
        y = y.view(x.shape) + D[:, None] * x
    return y.to(out_dtype), state


def chunk_mamba2(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mamba2` in chunks of tokens: matrix products inside a chunk, a short scan over chunks for the state.

    Raises:
        ValueError: a shape does not fit the others.

    Source: Dao & Gu 2024 (arXiv 2405.21060), §6.
    """
    _check(x, dt, A, B, C, D, initial_state, lengths)
    tokens, groups, out_dtype, pad = x.shape[1], B.shape[2], x.dtype, pad_mask(lengths, x.shape[1], x.device)
    size = min(_CHUNK, tokens)
    with no_autocast(x.device):
        x, dt, A, B, C, D, state = _prepared(x, dt, A, B, C, D, initial_state, pad)
        keys, queries, values, g = (in_chunks(z, size) for z in (B, C, dt[..., None] * x, (dt * A)[..., None]))
        # [B, chunks, G, c, K], and with the H / G heads of a group [B, chunks, G, H / G, c, ...].
        values, g = values.unflatten(2, (groups, -1)), g.squeeze(-1).unflatten(2, (groups, -1))
        kept, decay = g.cumsum(-1).exp(), _segment_sums(g).exp()
        y = ((queries @ keys.mT).unsqueeze(3) * decay) @ values
        written = keys.mT.unsqueeze(3) @ (values * decay[..., -1, :, None])
        state = state.unflatten(1, (groups, -1))
        states = []
        for kept_i, written_i in zip(kept[..., -1, None, None].unbind(1), written.unbind(1), strict=True):
            states.append(state)
            state = torch.addcmul(written_i, state, kept_i)
        y = torch.addcmul(y, queries.unsqueeze(3) @ torch.stack(states, 1), kept[..., None])
        y = y.flatten(2, 3).transpose(2, 3).flatten(1, 2)[:, :tokens] + D[:, None] * x
        return y.to(out_dtype), state.flatten(1, 2)


def _prepared(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    pad: Tensor | None,
) -> tuple[Tensor, ...]:
    """All inputs in the dtype that is computed in, with zeros at pads: those decay by exp(0), write 0 and read 0."""
    dtype = compute_dtype(x, dt, B, C)
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], x.shape[2], B.shape[3], x.shape[3], dtype=dtype)
    x, dt, B, C = (zero_pads(z, pad).to(dtype) for z in (x, dt, B, C))
    return x, dt, A.to(dtype), B, C, D.to(dtype), initial_state.to(dtype)


def _segment_sums(g: Tensor) -> Tensor:
    """`[..., c]` to `[..., c, c]`: at i, j the sum of g over j < t <= i; -inf where j > i.

    Each one is added up by itself: a difference of running sums would lose the digits of small ones after a large one.
    """
    after = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).tril(-1)
    sums = g[..., None].masked_fill(~after, 0).cumsum(-2)
    return sums.masked_fill(after.mT, -torch.inf)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    lengths: Tensor | None,
) -> None:
    if x.dim() != 4 or x.shape[1] < 1:
        raise misfit("x", x, "[B, T, H, V] with at least one token")
    batch, tokens, heads, width = x.shape
    if dt.shape != x.shape[:3]:
        raise misfit("dt", dt, f"[B, T, H] = {[batch, tokens, heads]}")
    if B.dim() != 4 or B.shape[:2] != x.shape[:2] or B.shape[2] < 1 or heads % B.shape[2]:
        raise misfit("B", B, f"[B, T, G, K] with [B, T] = {[batch, tokens]} and G a divisor of H = {heads}")
    if C.shape != B.shape:
        raise misfit("C", C, f"[B, T, G, K] like B, {list(B.shape)}")
    for name, z in (("A", A), ("D", D)):
        if z.shape != (heads,):
            raise misfit(name, z, f"[H] = {[heads]}")
    state_shape = (batch, heads, B.shape[3], width)
    if initial_state is not None and initial_state.shape != state_shape:
        raise misfit("initial_state", initial_state, f"[B, H, K, V] = {list(state_shape)}")
    check_lengths(lengths, batch)
