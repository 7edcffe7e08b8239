"""The gated delta rule and the short causal convolutions: all the arithmetic that reads and writes fast weights.

Each operator has a naive form (the judge), and a fast one that computes the same; `gated_delta_rule` picks by device
and number of tokens. Shapes are `[B, T, H, K]` (rows, tokens, heads, key width) and `[B, T, H, V]` throughout.
"""

from .convolution import dynamic_short_convolution, short_convolution
from .delta_rule import (
    chunk_gated_delta_rule,
    gate_hook,
    gated_delta_rule,
    naive_gated_delta_rule,
    step_gated_delta_rule,
)
from .fla import backend

__all__ = [
    "backend",
    "chunk_gated_delta_rule",
    "dynamic_short_convolution",
    "gate_hook",
    "gated_delta_rule",
    "naive_gated_delta_rule",
    "short_convolution",
    "step_gated_delta_rule",
]
