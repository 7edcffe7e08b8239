"""The gated delta rule and the short causal convolutions: all the arithmetic that reads and writes fast weights.

Each operator has a naive form (the judge), and a fast one that computes the same; `gated_delta_rule` picks by device
and number of tokens. Shapes are `[B, T, H, K]` (rows, tokens, heads, key width) and `[B, T, H, V]` throughout.
"""

import contextlib
import functools
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_NORM_EPS = 1e-6
_gate_hooks: list[Callable[[Tensor, Tensor, Tensor | None], None]] = []


def gated_delta_rule(
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
    `S <- S * exp(g)`; `u = beta * (v - S^T k)`; `S <- S + k u^T`; `o = S^T q`. Computed in fp32, fp64 inputs in fp64,
    also under autocast. Nothing is changed in place, and all six tensors get gradients, through both results.

    Args:
        q: queries `[B, T, H, K]`.
        k: keys `[B, T, H, K]`.
        v: values `[B, T, H, V]`.
        g: log of the decay, `[B, T, H]`, at most 0.
        beta: writing strength, `[B, T, H]`.
        initial_state: `[B, H, K, V]`; `None` is zeros.
        lengths: integers `[B]`, real tokens per row. They come first; the rest are pads, which leave the state exactly
            as it is, read 0, and get zero gradients, whatever they hold. `None`: all T are real.

    Returns:
        `o` `[B, T, H, V]` in v's dtype, and the state after the last real token `[B, H, K, V]`, fp32 or fp64.

    Raises:
        ValueError: a shape does not fit the others.

    Source: Yang et al. 2024 (arXiv 2412.06464), Eq. 10; Lee et al. 2026 (arXiv 2605.26099), §2.
    """
    for hook in _gate_hooks:
        hook(g, beta, lengths)
    if q.is_cuda and v.dtype in (torch.bfloat16, torch.float16) and backend(q.device) == "fla":
        return _fla_gated_delta_rule(q, k, v, g, beta, initial_state, lengths)
    if q.dim() == 4 and q.shape[1] == 1:
        return step_gated_delta_rule(q, k, v, g, beta, initial_state, lengths)
    return chunk_gated_delta_rule(q, k, v, g, beta, initial_state, lengths)


@contextlib.contextmanager
def gate_hook(hook: Callable[[Tensor, Tensor, Tensor | None], None]) -> Iterator[None]:
    """While open, every `gated_delta_rule` of this process shows `hook` its `g`, `beta` and `lengths` first."""
    _gate_hooks.append(hook)
    try:
        yield
    finally:
        _gate_hooks.remove(hook)


def backend(device: torch.device) -> str:
    """What `gated_delta_rule` uses on `device`: `"fla"` (Triton kernels, for 16-bit values) or `"torch"`.

    fla's kernels refuse fp32, so fp32 and fp64 values are computed by torch everywhere. A GPU without fla works, but
    slowly, and says so once per process.
    """
    if torch.device(device).type != "cuda":
        return "torch"
    return "fla" if _fla_is_available() else "torch"


@functools.cache
def _fla_is_available() -> bool:
    if importlib.util.find_spec("fla") is not None and importlib.util.find_spec("triton") is not None:
        return True
    warnings.warn(
        "hf_sleep runs the gated delta rule on the GPU with its slow torch fallback, because flash-linear-attention is "
        'not installed: pip install "hf-sleep[gpu]"',
        stacklevel=4,
    )
    return False


def naive_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` token by token, as its formula reads: what the others are judged by.

    Source: Yang et al. 2024 (arXiv 2412.06464), Eq. 10.
    """
    _check_delta_rule(q, k, v, g, beta, initial_state, lengths)
    dtype, out_dtype = _compute_dtype(q, k, v), v.dtype
    with _no_autocast(q.device):
        pad = _pad_mask(lengths, q.shape[1], q.device)
        q, k, v, g, beta = (_zero_pads(x, pad).to(dtype) for x in (q, k, v, g, beta))
        q = q / (q.square().sum(-1, keepdim=True) + _NORM_EPS).sqrt() * q.shape[-1] ** -0.5
        k = k / (k.square().sum(-1, keepdim=True) + _NORM_EPS).sqrt()
        if initial_state is None:
            initial_state = k.new_zeros(q.shape[0], *q.shape[2:], v.shape[3])
        state = initial_state.to(dtype)
        outputs = []
        for t in range(q.shape[1]):
            state = state * g[:, t, :, None, None].exp()
            u = beta[:, t, :, None] * (v[:, t] - (state * k[:, t, :, :, None]).sum(-2))
            state = state + k[:, t, :, :, None] * u[:, :, None, :]
            outputs.append((state * q[:, t, :, :, None]).sum(-2))
        return _zero_pads(torch.stack(outputs, 1), pad).to(out_dtype), state


def step_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` of a single token, for decoding: few calls, because calls are what a decode step costs.

    Raises:
        ValueError: a shape does not fit the others, or T is not 1.
    """
    _check_delta_rule(q, k, v, g, beta, initial_state, lengths)
    batch, tokens, heads, key_dim = q.shape
    if tokens != 1:
        raise _misfit("q", q, "[B, 1, H, K], because step_gated_delta_rule reads one token")
    dtype, out_dtype = _compute_dtype(q, k, v), v.dtype
    pad = _pad_mask(lengths, 1, q.device)
    if pad is not None:
        q, k, v, g, beta = (_zero_pads(x, pad) for x in (q, k, v, g, beta))
    with _no_autocast(q.device):
        n = batch * heads
        qk = torch.stack([q, k]).to(dtype).view(2, n, 1, key_dim)
        q, k = (qk * (torch.linalg.vector_norm(qk, dim=-1, keepdim=True).square() + _NORM_EPS).rsqrt()).unbind()
        v = v.to(dtype).reshape(n, 1, -1)
        if initial_state is None:
            initial_state = v.new_zeros(n, key_dim, v.shape[2])
        state = initial_state.to(dtype).reshape(n, key_dim, -1) * g.to(dtype).exp().reshape(n, 1, 1)
        u = torch.baddbmm(v, k, state, alpha=-1) * beta.to(dtype).reshape(n, 1, 1)
        state = torch.baddbmm(state, k.mT, u)
        o = torch.bmm(q, state) * key_dim**-0.5
    return o.view(batch, 1, heads, -1).to(out_dtype), state.view(batch, heads, key_dim, -1)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` in chunks of tokens: matrix products inside a chunk, a short scan over chunks for the state.

    Its backward is written by hand, so it can be differentiated once.

    Raises:
        ValueError: a shape does not fit the others.

    Source: Yang et al. 2024 (arXiv 2412.06464), §3.3; the backward is our own derivation.
    """
    _check_delta_rule(q, k, v, g, beta, initial_state, lengths)
    batch, tokens, heads, key_dim = q.shape
    dtype = _compute_dtype(q, k, v)
    if initial_state is None:
        initial_state = q.new_zeros(batch, heads, key_dim, v.shape[3], dtype=dtype)
    pad = _pad_mask(lengths, tokens, q.device)
    inputs = [_zero_pads(x, pad) for x in (q, k, v, g, beta)]
    size = _chunk_size(tokens)
    extra = -tokens % size
    if extra:
        inputs = [F.pad(x, (0, 0) * (x.dim() - 2) + (0, extra)) for x in inputs]
    o, state = _ChunkedDeltaRule.apply(*inputs, initial_state.to(dtype), size)
    return _zero_pads(o[:, :tokens] if extra else o, pad), state


def _chunk_size(tokens: int) -> int:
    return 16 if tokens <= 16 else 32


class _ChunkedDeltaRule(torch.autograd.Function):
    """`chunk_gated_delta_rule` for T a multiple of the chunk size c, and its gradient.

    Inside, tensors are `[C, N, c, ...]`: chunks, rows times heads, tokens of a chunk; the states between
    chunks are `[C + 1, N, K, V]`. With G the running sum of g in a chunk, and D_ij = exp(G_i - G_j) beta_j for j <= i:

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
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        dtype, key_dim = state.dtype, q.shape[3]
        ctx.dtypes = [x.dtype for x in (q, k, v, g, beta)]
        with _no_autocast(q.device):
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

            norm = torch.linalg.vector_norm(qk, dim=-1).square_().add_(_NORM_EPS).rsqrt_()
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
            states = state.new_empty(len(w) + 1, w.shape[1], *state.shape[2:])
            states[0] = state.flatten(0, 1)
            for w_i, erased_i, writes_i, kept_i, before, after in zip(
                w, erased, writes.mT, kept[..., -1, None, None], states[:-1], states[1:], strict=True
            ):
                w_i.baddbmm_(erased_i, before, alpha=-1)
                torch.mul(before, kept_i, out=after).baddbmm_(writes_i, w_i)
            o = _matmul(reads[:, :, 0], states[:-1])
            _add_matmul(o, scores[:, :, 0], w)

            ctx.save_for_backward(
                qk, v, beta, norm, decay, scores, inverse, kept, reads, written, writes, erased, w, states, o
            )
            return _from_chunks(o, q.shape[0], ctx.dtypes[2]), states[-1].unflatten(0, state.shape[:2]).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        qk, v, beta, norm, decay, scores, inverse, kept, reads, written, writes, *rest = ctx.saved_tensors
        erased, w, states, o = rest
        batch, size, key_dim = do.shape[0], qk.shape[3], qk.shape[4]
        with _no_autocast(do.device):
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
            return *results, dstates[0].unflatten(0, (batch, -1)), None


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


def _fla_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    _check_delta_rule(q, k, v, g, beta, initial_state, lengths)
    pad = _pad_mask(lengths, q.shape[1], q.device)
    q, k, v, g, beta = (_zero_pads(x, pad).contiguous() for x in (q, k, v, g, beta))
    # fla's recurrent kernel has no backward.
    wants_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, g, beta, initial_state)
    )
    kernel = fused_recurrent_gated_delta_rule if q.shape[1] == 1 and not wants_grad else chunk_gated_delta_rule
    o, state = kernel(
        q=q.to(v.dtype),
        k=k.to(v.dtype),
        v=v,
        g=g.float(),
        beta=beta,
        scale=q.shape[-1] ** -0.5,
        initial_state=None if initial_state is None else initial_state.float(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return _zero_pads(o, pad).to(v.dtype), state.float()


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
        raise _misfit("x", x, "[B, T, D] with at least one token")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise _misfit("weight", weight, f"[D, W] with D = {x.shape[2]}")
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
        raise _misfit("x", x, "[B, T, D] with at least one token")
    if taps.dim() != 4 or taps.shape[:3] != x.shape:
        raise _misfit("taps", taps, f"[B, T, D, W] with [B, T, D] = {list(x.shape)}")
    return _convolve(x, taps, conv_state, lengths)


def _convolve(x: Tensor, taps: Tensor, conv_state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = x.shape
    width = taps.shape[-1]
    if conv_state is None:
        conv_state = x.new_zeros(batch, channels, width)
    elif conv_state.shape != (batch, channels, width):
        raise _misfit("conv_state", conv_state, f"[B, D, W] = {[batch, channels, width]}")
    if lengths is None and tokens == 1:
        state = torch.cat([conv_state[..., 1:].to(x.dtype), x.mT], -1)
        products = state.to(_compute_dtype(x)) * (taps if taps.dim() == 2 else taps.squeeze(1))
        return products.sum(-1).to(x.dtype).unsqueeze(1), state
    _check_lengths(lengths, batch)
    pad = _pad_mask(lengths, tokens, x.device)
    if taps.dim() == 4:
        taps = _zero_pads(taps, pad)
    past = torch.cat([conv_state.to(x.dtype).mT, _zero_pads(x, pad)], 1)
    y = _zero_pads(_Convolution.apply(past, taps), pad)
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
        dtype, width = _compute_dtype(past), taps.shape[-1]
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
        dtype, width, tokens = _compute_dtype(past), taps.shape[-1], dy.shape[1]
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


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _pad_mask(lengths: Tensor | None, tokens: int, device: torch.device) -> Tensor | None:
    """`[B, T]`, True at pads; `None` if there are none, as far as can be told without waiting for a GPU."""
    if lengths is None or (lengths.device.type == "cpu" and bool((lengths >= tokens).all())):
        return None
    return torch.arange(tokens, device=device) >= lengths.to(device)[:, None]


def _zero_pads(x: Tensor, pad: Tensor | None) -> Tensor:
    """`x` `[B, T, ...]` with zeros where `pad`; a product would let the NaN of a pad through."""
    if pad is None:
        return x
    return x.masked_fill(pad.reshape(pad.shape + (1,) * (x.dim() - 2)), 0)


def _misfit(name: str, x: Tensor, what_works: str) -> ValueError:
    return ValueError(f"{name} has shape {tuple(x.shape)}: it must be {what_works}")


def _check_lengths(lengths: Tensor | None, batch: int) -> None:
    if lengths is not None and lengths.shape != (batch,):
        raise _misfit("lengths", lengths, f"[B] = {[batch]}, the real tokens of each row")


def _check_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, lengths: Tensor | None
) -> None:
    if q.dim() != 4 or q.shape[1] < 1:
        raise _misfit("q", q, "[B, T, H, K] with at least one token")
    batch, tokens, heads, key_dim = q.shape
    if k.shape != q.shape:
        raise _misfit("k", k, f"[B, T, H, K] like q, {list(q.shape)}")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise _misfit("v", v, f"[B, T, H, V] with [B, T, H] = {[batch, tokens, heads]}")
    if g.shape != q.shape[:3]:
        raise _misfit("g", g, f"[B, T, H] = {[batch, tokens, heads]}")
    if beta.shape != q.shape[:3]:
        raise _misfit("beta", beta, f"[B, T, H] = {[batch, tokens, heads]}")
    state_shape = (batch, heads, key_dim, v.shape[3])
    if initial_state is not None and initial_state.shape != state_shape:
        raise _misfit("initial_state", initial_state, f"[B, H, K, V] = {list(state_shape)}")
    _check_lengths(lengths, batch)
