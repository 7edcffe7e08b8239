"""A fast-weight block: linear attention, which forgets nothing. S <- S + k v^T, o = S^T q."""

import torch
from torch import nn

from hf_sleep import FastWeightMixer, FastWeights, register_block


@register_block("linear_attention")
class LinearAttention(FastWeightMixer):
    def __init__(self, hidden_size, num_heads, head_dim, expand_v, conv_size):
        super().__init__(hidden_size, num_heads, head_dim, expand_v, conv_size)
        self.widths = (head_dim, head_dim, self.head_v_dim)
        self.qkv_proj = nn.Linear(hidden_size, num_heads * sum(self.widths), bias=False)
        self.o_proj = nn.Linear(num_heads * self.head_v_dim, hidden_size, bias=False)

    def empty(self, batch_size, device, dtype):
        S = torch.zeros(batch_size, self.num_heads, *self.widths[1:], device=device)
        return FastWeights(S.to(torch.promote_types(dtype, torch.float32)), S.new_zeros(batch_size, 1, 1, dtype=dtype))

    def forward(self, x, fast_weights, lengths=None, decays=True):
        q, k, v = self.qkv_proj(x).unflatten(-1, (self.num_heads, -1)).split(self.widths, dim=-1)
        if lengths is not None:  # a pad writes nothing
            k = k * (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None, None]
        S = fast_weights.recurrent_state[:, None] + (k[..., None] * v[..., None, :]).cumsum(1)
        o = (q[..., None] * S).sum(-2).to(x.dtype)
        return self.o_proj(o.flatten(2)), FastWeights(S[:, -1], fast_weights.conv_state)
