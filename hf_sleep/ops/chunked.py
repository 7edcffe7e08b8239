"""The gated delta rule in chunks of tokens, with a backward of its own."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import no_autocast

NORM_EPS = 1e-6


def chunked_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """A form of the gated delta rule (`delta_rule.Form`) for several tokens."""
    tokens = q.shape[1]
    size = chunk_size(tokens)
    inputs = [q, k, v, g, beta]
    extra = -tokens % size
    if extra:
        inputs = [F.pad(x, (0, 0) * (x.dim() - 2) + (0, extra)) for x in inputs]
    is_differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, state))
    o, state = _ChunkedDeltaRule.apply(*inputs, state, size, is_differentiated)
    return o[:, :tokens] if extra else o, state


def chunk_size(tokens: int) -> int:
    """The chunk size c for so many tokens, in tokens; the fastest where it was measured.

    32, or 16 where that saves a call of few tokens half a chunk of pads. Measured on CPUs with AVX2 and with AVX-512,
    on one thread and two, for heads from 64 x 64 to 96 x 256 (docs/benchmarks.md): no other rule won by more than a
    few hundredths on either, so there is one for all.
    """
    return 16 if tokens <= 80 and -tokens % 32 >= 16 else 32


class _ChunkedDeltaRule(torch.autograd.Function):
    """`chunk_gated_delta_rule` for T a multiple of the chunk size c, and its gradient.

    Inside, tensors are `[C, N, c, ...]`: chunks, rows times heads, tokens of a chunk; the states between chunks are
    `[C + 1, N, K, V]`. With G the running sum of g in a chunk, and D_ij = exp(G_i - G_j) beta_j for j <= i:

        w = (I + strict(k k^T * D))^-1 (v - exp(G) k S)        what a token corrects, before beta
        o = exp(G) q S + (q k^T * D) w
        S' = exp(G_c) S + (exp(G_c - G) beta k)^T w

    Queries and keys are stacked as `[2, c, K]` wherever both meet the same matrix. In backward, x is the gradient of v.
    Each use of q_i, k_i, beta_i and G_i scales a whole term above, so what G, beta and the norms of q and k need are
    dot products along V: dG = o.do - x.v (plus S'.dS' on a chunk's last token), beta.dbeta = x.w, q.dq = o.do and
    k.dk = 2 x.w - x.v.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor,
        size: int,
        is_differentiated: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype, key_dim = state.dtype, q.shape[3]
        ctx.dtypes = [x.dtype for x in (q, k, v, g, beta)]
        batch, tokens, heads, _ = q.shape
        shape = (tokens // size, batch * heads)
        qk = _fill(state.new_empty(*shape, 2, size, key_dim), q, k)
        v = _fill(state.new_empty(*shape, 1, size, v.shape[3]), v).squeeze(2)
        # exp() of anything below is 0, and a huge term would cost the running sum its digits.
        gates = _fill(state.new_empty(*shape, 2, size), g, beta)
        total = gates[:, :, 0].clamp(min=1.2 * math.log(torch.finfo(dtype).tiny)).cumsum(-1)
        # Backward divides by beta: this is far too small to show in any result.
        tiny = torch.finfo(dtype).tiny ** 0.5
        beta = gates[:, :, 1].masked_fill(gates[:, :, 1].abs() < tiny, tiny)

        norm = torch.linalg.vector_norm(qk, dim=-1).square_().add_(NORM_EPS).rsqrt_()
        norm[:, :, 0] *= key_dim**-0.5
        qk *= norm[..., None]
        decay = (total[..., :, None] - total[..., None, :]).clamp_(max=0).exp_().mul_(beta[..., None, :]).tril_()
        scores = _matmul(qk.flatten(2, 3), qk[:, :, 1].mT).unflatten(2, (2, size)).mul_(decay[:, :, None])
        eye = torch.eye(size, dtype=dtype, device=q.device)
        inverse = torch.linalg.solve_triangular(scores[:, :, 1], eye, upper=False, unitriangular=True)

        kept = total.exp()
        reads = qk * kept[:, :, None, :, None]
        written = (total[..., -1:] - total).exp_().mul_(beta)
        writes = qk[:, :, 1] * written[..., None]
        erased = _matmul(inverse, reads[:, :, 1])
        w = _matmul(inverse, v)
        # Only backward needs the states between chunks. Else two places take them in turn.
        states = state.new_empty(len(w) + 1 if is_differentiated else 2, w.shape[1], *state.shape[2:])
        states[0] = state.flatten(0, 1)
        o = torch.empty_like(w)
        places = len(states)
        chunks = zip(w, erased, writes.mT, kept[..., -1, None, None], reads[:, :, 0], o, strict=True)
        for i, (w_i, erased_i, writes_i, kept_i, reads_i, o_i) in enumerate(chunks):
            before, after = states[i % places], states[(i + 1) % places]
            w_i.baddbmm_(erased_i, before, alpha=-1)
            torch.bmm(reads_i, before, out=o_i)
            torch.mul(before, kept_i, out=after).baddbmm_(writes_i, w_i)
        _add_matmul(o, scores[:, :, 0], w)

        if is_differentiated:
            ctx.save_for_backward(
                qk, v, beta, norm, decay, scores, inverse, kept, reads, written, writes, erased, w, states, o
            )
        return _from_chunks(o, q.shape[0], ctx.dtypes[2]), after.unflatten(0, state.shape[:2]).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        qk, v, beta, norm, decay, scores, inverse, kept, reads, written, writes, *rest = ctx.saved_tensors
        erased, w, states, o = rest
        batch, size, key_dim = do.shape[0], qk.shape[3], qk.shape[4]
        with no_autocast(do.device):
            grads = qk.new_empty(*qk.shape[:4], w.shape[-1])
            do = _fill(grads[:, :, :1], do).squeeze(2)
            dw = _matmul(scores[:, :, 0].mT, do)
            dstates = torch.empty_like(states)
            dstates[-1] = dstate.flatten(0, 1)
            torch.bmm(reads[:, :, 0].flatten(0, 1).mT, do.flatten(0, 1), out=dstates[:-1].flatten(0, 1))
            for i in reversed(range(len(w))):
                dw[i].baddbmm_(writes[i], dstates[i + 1])
                dstates[i].addcmul_(dstates[i + 1], kept[i, :, -1, None, None])
                dstates[i].baddbmm_(erased[i].mT, dw[i], alpha=-1)
            x = _matmul(inverse.mT, dw)

            torch.neg(x, out=grads[:, :, 1])
            # dw is not read again: its memory takes the products, since touching new pages costs more than they do.
            read, moved, corrected = (torch.mul(a, b, out=dw).sum(-1) for a, b in ((o, do), (v, x), (w, x)))
            grads = grads.flatten(2, 3)
            dscores = _matmul(grads, w.mT).unflatten(2, (2, size)).mul_(decay[:, :, None])
            dscores[:, :, 1].tril_(-1)
            dscores = dscores.flatten(2, 3)
            dqk = _matmul(grads, states[:-1].mT).unflatten(2, (2, size)).mul_(kept[:, :, None, :, None])
            _add_matmul(dqk.flatten(2, 3), dscores, qk[:, :, 1])
            dwrites = _matmul(w, dstates[1:].mT).mul_(written[..., None])
            _add_matmul(dwrites, dscores.mT, qk.flatten(2, 3))
            dqk[:, :, 1] += dwrites

            dbeta = corrected / beta
            along = torch.stack([read * key_dim, 2 * corrected - moved], 2)
            dqk.addcmul_(qk, along[..., None], value=-1).mul_(norm[..., None])
            dg = read - moved
            dg[..., -1] += dstates[1:].mul_(states[1:]).sum((-2, -1))
            dg = dg.flip(-1).cumsum(-1).flip(-1)
            results = [
                _from_chunks(y, batch, dtype)
                for y, dtype in zip((dqk[:, :, 0], dqk[:, :, 1], x, dg, dbeta), ctx.dtypes, strict=True)
            ]
            return *results, dstates[0].unflatten(0, (batch, -1)), None, None


def _fill(chunks: Tensor, *parts: Tensor) -> Tensor:
    """Copy each of `parts`, `[B, T, H, ...]`, into its slot of `chunks`, `[C, B * H, len(parts), c, ...]`."""
    slots = chunks.unflatten(1, (parts[0].shape[0], -1)).unbind(3)
    for slot, part in zip(slots, parts, strict=True):
        slot.copy_(part.unflatten(1, (len(chunks), -1)).movedim((1, 3), (0, 2)))
    return chunks


def _from_chunks(x: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """`[C, B * H, c, ...]` to `[B, T, H, ...]` of `dtype`."""
    x = x.unflatten(1, (batch, -1)).movedim((0, 2), (1, 3))
    return x.to(dtype, memory_format=torch.contiguous_format, copy=True).flatten(1, 2)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a [C, N, i, j] @ b [C, N, j, k]` without the copies torch.matmul makes of batches it cannot fold."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def _add_matmul(y: Tensor, a: Tensor, b: Tensor) -> None:
    y.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
