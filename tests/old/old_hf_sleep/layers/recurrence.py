"""What every gated-delta-rule mixer has: decay and write gates, the state it carries, the gated output norm."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..config import is_whole

State = tuple[torch.Tensor, torch.Tensor]
"""What a fast-weight layer carries from token to token: `recurrent_state` `[B, H, K, V]` fp32 (fp64 in an fp64 model)
and
`conv_state` `[B, D, W]`, the last W inputs of its short convolution, oldest first."""


GATES = ("A_log", "dt_bias")
"""Parameters that set how fast a memory decays. Loading keeps them fp32 at least, whatever the model's dtype."""


def keeping(fn: Callable, tensors: Iterable[torch.Tensor]) -> Callable:
    """`fn`, as `nn.Module._apply` takes it, without the cast to 16 bits where it is called with one of `tensors`."""
    kept = [t for tensor in tensors for t in (tensor, tensor.grad) if t is not None]

    def apply(t: torch.Tensor) -> torch.Tensor:
        applied = fn(t)
        dtype = torch.promote_types(applied.dtype, torch.float32)
        if applied.dtype in (t.dtype, dtype) or not any(t is tensor for tensor in kept):
            return applied
        return t.to(applied.device, dtype)

    return apply


class GatedRMSNorm(nn.Module):
    """`RMSNorm(x) * silu(gate)` over the last dimension, in fp32 with one cast at the end."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        compute = torch.promote_types(x.dtype, torch.float32)
        normed = F.rms_norm(x.to(compute), self.weight.shape, self.weight.to(compute), self.eps)
        return (normed * F.silu(gate.to(compute))).to(gate.dtype)


class GatedDeltaMixer(nn.Module):
    """Base of the mixers: `x` `[B, T, C]` and a `State` in, `[B, T, C]` and the new `State` out.

    Args:
        hidden_size: C.
        num_heads: H.
        head_dim: K, key width of a head.
        expand_v: V / K.
        conv_size: W, taps of the short convolution (tokens).
        norm_eps: of the output norm.

    Source: Yang et al. 2025 (arXiv 2412.06464), gates and output norm; Lee et al. 2026, §2.
    """

    conv_dim: int

    def __init__(
        self, hidden_size: int, num_heads: int, head_dim: int, expand_v: float, conv_size: int, norm_eps: float = 1e-5
    ):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.head_v_dim = round(head_dim * expand_v)
        self.key_dim = num_heads * head_dim
        self.value_dim = num_heads * self.head_v_dim
        self.conv_size = conv_size
        if not is_whole(head_dim * expand_v):
            raise ValueError(
                f"expand_v={expand_v} gives heads of {head_dim * expand_v} values; head_dim={head_dim} times "
                "expand_v must "
                "be a whole number"
            )
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.a_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        gate_dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.A_log = nn.Parameter(torch.zeros(num_heads, dtype=gate_dtype))
        self.dt_bias = nn.Parameter(torch.zeros(num_heads, dtype=gate_dtype))
        self.o_norm = GatedRMSNorm(self.head_v_dim, norm_eps)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> "GatedDeltaMixer":
        # .to(bfloat16), .half() and the like leave the gates what loading in that dtype leaves them: a rounded decay
        # is forgetting at another rate.
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keeping(fn, (self.A_log, self.dt_bias)), recurse=False)

    def forward(self, x: torch.Tensor, state: State, lengths: torch.Tensor | None = None) -> tuple[torch.Tensor, State]:
        """Mix over time.

        Args:
            x: `[B, T, C]`.
            state: what the layer carried out of the tokens before.
            lengths: `[B]` real tokens per row, pads behind them; `None` where all T are real.
        """
        raise NotImplementedError

    def decay(self, x: torch.Tensor) -> torch.Tensor:
        """Log of α: `-exp(A_log) * softplus(a(x) + dt_bias)`, `[B, T, H]`, at least fp32."""
        a = self.a_proj(x)
        a = a.to(torch.promote_types(a.dtype, torch.float32))
        return -self.A_log.to(a.dtype).exp() * F.softplus(a + self.dt_bias.to(a.dtype))

    def output(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Gated norm over each head's values, then the output projection: `[B, T, H, V]` to `[B, T, C]`."""
        gate = self.g_proj(x).unflatten(-1, (self.num_heads, self.head_v_dim))
        return self.o_proj(self.o_norm(o, gate).flatten(-2))

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The empty memory: zeros. `dtype` is the activations'."""
        shape = (batch_size, self.num_heads, self.head_dim, self.head_v_dim)
        recurrent_state = torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return recurrent_state, torch.zeros(batch_size, self.conv_dim, self.conv_size, device=device, dtype=dtype)

    def init_weights(self, std: float, generator: torch.Generator | None = None) -> None:
        """Fresh parameters: projections N(0, std), A ~ U(0, 16), time step log-uniform in [1e-3, 0.1].

        Source: Gu & Dao 2024 (arXiv 2312.00752), §3.6, for the gates.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init.normal_(module.weight, std=std, generator=generator)
        init.ones_(self.o_norm.weight)
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(1e-4, 16, generator=generator).log())
        low, high = math.log(1e-3), math.log(0.1)
        step = torch.empty_like(self.dt_bias).uniform_(low, high, generator=generator).exp()
        init.copy_(self.dt_bias, step + torch.log(-torch.expm1(-step)))
