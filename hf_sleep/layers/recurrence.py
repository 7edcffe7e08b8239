"""Base of the gated-delta-rule mixers: decay and write gates, the recurrence, the gated output norm."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..memory import FastWeights
from ..ops import gated_delta_rule
from .block import FastWeightMixer


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


class GatedDeltaMixer(FastWeightMixer):
    """Base of the mixers on the gated delta rule, which differ by their short convolution alone.

    A subclass sets `conv_dim`, D, the channels that it convolves, and makes queries, keys and values in `qkv`.

    Args:
        hidden_size: C.
        num_heads: H.
        head_dim: K, key width of a head.
        expand_v: V / K.
        conv_size: W, taps of the short convolution (tokens).
        norm_eps: of the output norm.

    Source: Yang et al. 2025 (arXiv 2412.06464), gates and output norm; Lee et al. 2026, §2.
    """

    fp32_parameters = ("A_log", "dt_bias")
    conv_dim: int

    def __init__(
        self, hidden_size: int, num_heads: int, head_dim: int, expand_v: float, conv_size: int, norm_eps: float = 1e-5
    ):
        super().__init__(hidden_size, num_heads, head_dim, expand_v, conv_size)
        self.key_dim = num_heads * head_dim
        self.value_dim = num_heads * self.head_v_dim
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

    def qkv(
        self, x: torch.Tensor, conv_state: torch.Tensor, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project and convolve `x` `[B, T, C]`.

        Returns:
            Queries and keys `[B, T, H * K]` and values `[B, T, H * V]`, all after their SiLU, and the new `conv_state`.
        """
        raise NotImplementedError

    def forward(
        self,
        x: torch.Tensor,
        fast_weights: FastWeights,
        lengths: torch.Tensor | None = None,
        decays: bool = True,
    ) -> tuple[torch.Tensor, FastWeights]:
        recurrent_state, conv_state = fast_weights
        q, k, v, conv_state = self.qkv(x, conv_state, lengths)
        g = self.decay(x)
        o, recurrent_state = gated_delta_rule(
            q.unflatten(-1, (self.num_heads, self.head_dim)),
            k.unflatten(-1, (self.num_heads, self.head_dim)),
            v.unflatten(-1, (self.num_heads, self.head_v_dim)),
            g if decays else torch.zeros_like(g),
            self.b_proj(x).sigmoid(),
            recurrent_state,
            lengths,
        )
        return self.output(o, x), FastWeights(recurrent_state, conv_state)

    def decay(self, x: torch.Tensor) -> torch.Tensor:
        """Log of α: `-exp(A_log) * softplus(a(x) + dt_bias)`, `[B, T, H]`, at least fp32."""
        a = self.a_proj(x)
        a = a.to(torch.promote_types(a.dtype, torch.float32))
        return -self.A_log.to(a.dtype).exp() * F.softplus(a + self.dt_bias.to(a.dtype))

    def output(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Gated norm over each head's values, then the output projection: `[B, T, H, V]` to `[B, T, C]`."""
        gate = self.g_proj(x).unflatten(-1, (self.num_heads, self.head_v_dim))
        return self.o_proj(self.o_norm(o, gate).flatten(-2))

    def empty(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> FastWeights:
        shape = (batch_size, self.num_heads, self.head_dim, self.head_v_dim)
        return FastWeights(
            torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32)),
            torch.zeros(batch_size, self.conv_dim, self.conv_size, device=device, dtype=dtype),
        )

    def init_weights(self, std: float, generator: torch.Generator | None = None) -> None:
        self.draw_weights(std, generator)
        init.zeros_(self.o_proj.weight)

    def init_half_lives(self, half_lives: torch.Tensor) -> None:
        # A = 1 and the half-life in dt_bias, far below zero, where softplus is an exponential: a(x) divides a half-life
        # by e^a, up or down, until a head forgets within a token. With it in A, softplus would be near its linear part,
        # and a(x) could hardly shorten a long one.
        rate = math.log(2) / half_lives
        init.zeros_(self.A_log)
        init.copy_(self.dt_bias, rate + torch.log(-torch.expm1(-rate)))

    def draw_weights(self, std: float, generator: torch.Generator | None = None) -> None:
        """Set fresh parameters of a layer that a base has of its own, whose output is no zero.

        Projections N(0, std), A ~ U(0, 16), time step log-uniform in [1e-3, 0.1].

        Args:
            std: of the projections.
            generator: to draw from; by default torch's own.

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
