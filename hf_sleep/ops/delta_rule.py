"""The gated delta rule: the public function, its naive form (the judge), and the form for a single token."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import fla
from .checks import check_delta_rule, compute_dtype, misfit, no_autocast, pad_mask, zero_pads
from .chunked import NORM_EPS, chunked_delta_rule

Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A way to compute the rule: q, k, v, g, beta and the state in; the output, in any dtype, and the new state out.

All that the forms share is done before: shapes fit, pads are zeros, autocast is off. The state comes in the dtype to
compute in, fp32 or fp64. The others come as they were given, because a form copies them anyway, and casts as it copies.
"""

GateHook = Callable[[Tensor, Tensor, Tensor | None], None]


class _Gates(threading.local):
    hooks: tuple[GateHook, ...] = ()


_gates = _Gates()


@contextlib.contextmanager
def gate_hook(hook: GateHook) -> Iterator[None]:
    """Show `hook` the `g`, `beta` and `lengths` of every `gated_delta_rule` that this thread calls while it is open.

    A thread's own, because models may run in several threads at a time, and one must not count another's gates. Not a
    field of a layer, because a hybrid base's recurrent layers are classes of transformers. Not a context variable,
    because torch.compile cannot trace one.
    """
    outer = _gates.hooks
    _gates.hooks = (*outer, hook)
    try:
        yield
    finally:
        _gates.hooks = outer


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
    for hook in _gates.hooks:
        hook(g, beta, lengths)
    return _run(_fastest_delta_rule, q, k, v, g, beta, initial_state, lengths)


def naive_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` token by token, as its formula reads: the judge of the others.

    Source: Yang et al. 2024 (arXiv 2412.06464), Eq. 10.
    """
    return _run(_naive_delta_rule, q, k, v, g, beta, initial_state, lengths)


def step_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` of a single token, for decoding.

    Raises:
        ValueError: a shape does not fit the others, or T is not 1.
    """
    if q.dim() == 4 and q.shape[1] > 1:
        raise misfit("q", q, "[B, 1, H, K], because step_gated_delta_rule reads one token")
    return _run(_step_delta_rule, q, k, v, g, beta, initial_state, lengths)


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
    return _run(chunked_delta_rule, q, k, v, g, beta, initial_state, lengths)


def _run(
    form: Form,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run a form on inputs that were checked, whose pads are zeros, with the state in the dtype to compute in."""
    check_delta_rule(q, k, v, g, beta, initial_state, lengths)
    dtype = compute_dtype(q, k, v)
    pad = pad_mask(lengths, q.shape[1], q.device)
    if pad is not None:
        q, k, v, g, beta = (zero_pads(x, pad) for x in (q, k, v, g, beta))
    if initial_state is None:
        initial_state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[3], dtype=dtype)
    with no_autocast(q.device):
        o, state = form(q, k, v, g, beta, initial_state.to(dtype))
    if q.shape[1] > 1:  # A decode step is made of few calls: there the zero query of a pad has read 0 by itself.
        o = zero_pads(o, pad)
    return o.to(v.dtype), state


def _fastest_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    inputs = (q, k, v, g, beta, state)
    fits = q.is_cuda and v.dtype in (torch.bfloat16, torch.float16) and fla.backend(q.device) == "fla"
    if fits and (not fla.wants_gradient(*inputs) or fla.has_backward(q.device)):
        return fla.fla_delta_rule(*inputs)
    form = _step_delta_rule if q.shape[1] == 1 else chunked_delta_rule
    return form(*inputs)


def _naive_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta = (x.to(state.dtype) for x in (q, k, v, g, beta))
    q = q / (q.square().sum(-1, keepdim=True) + NORM_EPS).sqrt() * q.shape[-1] ** -0.5
    k = k / (k.square().sum(-1, keepdim=True) + NORM_EPS).sqrt()
    outputs = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        u = beta[:, t, :, None] * (v[:, t] - (state * k[:, t, :, :, None]).sum(-2))
        state = state + k[:, t, :, :, None] * u[:, :, None, :]
        outputs.append((state * q[:, t, :, :, None]).sum(-2))
    return torch.stack(outputs, 1), state


def _step_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Compute one token in few calls, because calls are the cost of a decode step."""
    batch, _, heads, key_dim = q.shape
    dtype, n = state.dtype, batch * heads
    qk = torch.stack([q, k]).to(dtype).view(2, n, 1, key_dim)
    q, k = (qk * (torch.linalg.vector_norm(qk, dim=-1, keepdim=True).square() + NORM_EPS).rsqrt()).unbind()
    v = v.to(dtype).reshape(n, 1, -1)
    state = state.reshape(n, key_dim, -1) * g.to(dtype).exp().reshape(n, 1, 1)
    u = torch.baddbmm(v, k, state, alpha=-1) * beta.to(dtype).reshape(n, 1, 1)
    state = torch.baddbmm(state, k.mT, u)
    o = torch.bmm(q, state) * key_dim**-0.5
    return o.view(batch, 1, heads, -1), state.view(batch, heads, key_dim, -1)
