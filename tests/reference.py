"""Algorithm 1 written naively: one row, window by window, pass by pass, layer by layer, token by token.

The judge of the engine. It borrows the base's own layers and the parameters of the fast-weight blocks, and nothing else
of hf_sleep: the recurrence, the convolution, the masks, the positions and the eviction are written out here.

Source: Lee et al. 2026 (arXiv 2605.26099), Alg. 1; what it leaves open is decided as in docs/how-it-works.md.
"""

import functools
import sys
from types import MappingProxyType, SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F

from hf_sleep.compat import CACHE


def delta_rule(q, k, v, g, beta, S):
    """Gated delta rule of q, k `[T, H, K]`, v `[T, H, V]`, g, beta `[T, H]`, S `[H, K, V]`: o `[T, H, V]`, S."""
    q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
    outputs = []
    for t in range(len(q)):
        S = S * g[t].exp()[:, None, None]
        u = beta[t][:, None] * (v[t] - torch.einsum("hkv,hk->hv", S, k[t]))
        S = S + torch.einsum("hk,hv->hkv", k[t], u)
        outputs.append(torch.einsum("hkv,hk->hv", S, q[t]) * q.shape[-1] ** -0.5)
    return torch.stack(outputs), S


def convolve(x, taps, tail):
    """Causal convolution of x `[T, D]` with taps `[T, D, W]` after the tail `[D, W]`: y `[T, D]`, the new tail."""
    width = tail.shape[-1]
    padded = torch.cat((tail.T, x))
    y = torch.stack([(taps[t] * padded[t + 1 : t + 1 + width].T).sum(-1) for t in range(len(x))])
    return y, padded[-width:].T


def run_mixer(m, x, S, tail, decays=True):
    """A Jet or Gated DeltaNet mixer on x `[T, C]`."""
    q, k, v = m.q_proj(x), m.k_proj(x), m.v_proj(x)
    if hasattr(m, "dynamic_conv1d"):
        maker = m.dynamic_conv1d.kernel_generator
        v, tail = convolve(v, maker.w2(F.silu(maker.w1(x))).view(*v.shape, -1), tail)
    else:
        qkv, tail = convolve(torch.cat((q, k, v), -1), m.conv_weight.expand(len(x), -1, -1), tail)
        q, k, v = qkv.split((q.shape[-1], k.shape[-1], v.shape[-1]), -1)
    q, k, v = (F.silu(z).unflatten(-1, (m.num_heads, -1)) for z in (q, k, v))
    g = -m.A_log.exp() * F.softplus(m.a_proj(x) + m.dt_bias) * decays
    o, S = delta_rule(q, k, v, g, m.b_proj(x).sigmoid(), S)
    o = o / (o.square().mean(-1, keepdim=True) + m.o_norm.eps).sqrt() * m.o_norm.weight
    o = o * F.silu(m.g_proj(x)).view_as(o)
    return m.o_proj(o.flatten(-2)), (S, tail)


def run_block(block, h, S, tail, decays):
    """One injected fast-weight block on h `[T, C]`."""
    mixed, state = MIXERS.get(type(block.mixer).__name__, run_mixer)(block.mixer, block.norm(h), S, tail, decays)
    return h + mixed, state


def run_jet_layer(layer, h, S, tail, decays):
    """One of Jet-Nemotron's own Jet layers on h `[T, C]`."""
    mixed, state = run_mixer(layer.self_attn, layer.input_layernorm(h), S, tail, decays)
    h = h + mixed
    return h + layer.mlp(layer.post_attention_layernorm(h)), state


def run_mamba2_layer(layer, h, S, tail, decays):
    """One of Granite 4's or Bamba's own Mamba2 layers on h `[T, C]`; S `[H, N, P]` is Mamba's `[H, P, N]` turned."""
    m, outputs = layer.mamba, []
    z, u, dt = m.in_proj(layer.input_layernorm(h)).split((m.intermediate_size, m.conv_dim, m.num_heads), -1)
    u, tail = convolve(u, m.conv1d.weight.squeeze(1).expand(len(h), -1, -1), tail)
    u, width = F.silu(u if m.conv1d.bias is None else u + m.conv1d.bias), m.n_groups * m.ssm_state_size
    x, B, C = u.split((m.intermediate_size, width, width), -1)
    group = torch.arange(m.num_heads) * m.n_groups // m.num_heads
    x, B, C = (v.unflatten(-1, (heads, -1)) for v, heads in ((x, m.num_heads), (B, m.n_groups), (C, m.n_groups)))
    dt = F.softplus(dt + m.dt_bias).clamp(*m.time_step_limit)
    for t in range(len(h)):
        S = S * (-dt[t] * m.A_log.exp() * decays).exp()[:, None, None]
        S = S + torch.einsum("h,hn,hp->hnp", dt[t], B[t, group], x[t])
        outputs.append(torch.einsum("hnp,hn->hp", S, C[t, group]) + m.D[:, None] * x[t])
    y = torch.stack(outputs).flatten(1) * F.silu(z)
    # In groups, where this transformers does so.
    y = y.unflatten(-1, (-1, getattr(m.norm, "group_size", m.intermediate_size)))
    y = y / (y.square().mean(-1, keepdim=True) + m.norm.variance_epsilon).sqrt()
    scale = getattr(layer, "residual_multiplier", 1)
    h = h + m.out_proj(y.flatten(1) * m.norm.weight) * scale
    if hasattr(layer, "feed_forward"):
        return h + layer.feed_forward(layer.pre_ff_layernorm(h)), (S, tail)
    normed = layer.post_attention_layernorm(h)[None]
    out = layer.shared_mlp(normed)[0]
    if layer.block_sparse_moe is not None:
        out = out + layer.block_sparse_moe(normed)[0]
    return h + out * scale, (S, tail)


def run_kda_layer(layer, h, S, tail, decays):
    """One of Kimi Linear's own layers of Kimi Delta Attention on h `[T, C]`."""
    m, x, outputs = layer.self_attn, layer.input_layernorm(h), []
    qkv = torch.cat((m.q_proj(x), m.k_proj(x), m.v_proj(x)), -1)
    qkv, tail = convolve(qkv, m.conv1d.weight.squeeze(1).expand(len(h), -1, -1), tail)
    q, k, v = (z.unflatten(-1, (m.num_heads, m.head_dim)) for z in F.silu(qkv).chunk(3, -1))
    q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
    f = m.forget_gate
    step = F.softplus(f.f_b_proj(f.f_a_proj(x)) + f.dt_bias).view_as(q)
    g, beta = -f.A_log.exp().view(-1, 1) * step * decays, m.b_proj(x).sigmoid()
    for t in range(len(h)):
        S = S * g[t].exp()[:, :, None]
        u = beta[t][:, None] * (v[t] - torch.einsum("hkv,hk->hv", S, k[t]))
        S = S + torch.einsum("hk,hv->hkv", k[t], u)
        outputs.append(torch.einsum("hkv,hk->hv", S, q[t]) * m.head_dim**-0.5)
    o = torch.stack(outputs)
    o = o / (o.square().mean(-1, keepdim=True) + m.o_norm.variance_epsilon).sqrt() * m.o_norm.weight
    o = o * m.g_b_proj(m.g_a_proj(x)).view_as(o).sigmoid()
    h = h + m.o_proj(o.flatten(1))
    return h + layer.mlp(layer.post_attention_layernorm(h)[None])[0], (S, tail)


RUN_OWN_LAYER = {
    "jet_nemotron": run_jet_layer,
    "granitemoehybrid": run_mamba2_layer,
    "bamba": run_mamba2_layer,
    "kimi_linear": run_kda_layer,
}


def own_shapes(layer):
    """Shapes of S and of the tail of one of the base's own recurrent layers."""
    if hasattr(layer, "mamba"):
        m = layer.mamba
        return (m.num_heads, m.ssm_state_size, m.head_dim), (m.conv_dim, m.conv_kernel_size)
    if hasattr(layer, "linear_attn"):
        m = layer.linear_attn
        return (m.num_v_heads, m.head_k_dim, m.head_v_dim), (m.conv_dim, m.conv_kernel_size)
    m = layer.self_attn
    if hasattr(m, "forget_gate"):
        return (m.num_heads, m.head_dim, m.head_dim), (m.conv_dim, m.conv_kernel_size)
    return (m.num_heads, m.head_dim, m.head_v_dim), (m.conv_dim, m.conv_size)


def stock_delta_rule(query, key, value, g, beta, initial_state, decays=True, **_):
    """`delta_rule` in the place of the one that the base's own linear layers call, for a single row."""
    groups = value.shape[2] // key.shape[2]
    q, k = (z[0].repeat_interleave(groups, dim=1) for z in (query, key))
    o, S = delta_rule(q, k, value[0], g[0] * decays, beta[0], initial_state[0])
    return o[None].to(value.dtype), S[None]


def naive(decays):
    """What stands in for the functions of a stock module with linear layers."""
    rule = functools.partial(stock_delta_rule, decays=decays)
    return {"torch_chunk_gated_delta_rule": rule, "torch_recurrent_gated_delta_rule": rule}


INTERLEAVED = ("cohere", "cohere2", "ernie4_5", "glm", "glm4", "helium")
"""Models whose RoPE turns channels 2j and 2j + 1 together."""


# What a sleep keeps of the KV besides the sinks, and how far attention reaches, in tokens, for a window of L.
EVICTIONS = {"hard": lambda L: (0, None), "sliding": lambda L: (L - 1, L)}
# What the next pass reads, of the step's parameters, what the last pass wrote and pass 1 read.
BETWEEN = {"none": lambda step, z, e: z, "gate": lambda step, z, e: (1 - step.gate) * e + step.gate * z}
# Of blocks that are no gated delta rule: how to run the mixer, and the shapes of its S and of its tail.
MIXERS = {}


class LayerCache:
    """Cache as one stock layer sees it: retained KV, or the state its recurrence starts from."""

    def __init__(self, kv=None, S=None, tail=None):
        self.kv, self.S, self.tail = kv, S, tail

    def update(self, k, v, layer_idx, **_):
        self.kv = (k, v) if self.kv is None else tuple(torch.cat(pair, 2) for pair in zip(self.kv, (k, v), strict=True))
        return self.kv

    def get_conv_state(self, layer_idx, state_idx=0):
        return self.tail[None]

    def get_recurrent_state(self, layer_idx, state_idx=0):
        return self.S[None]

    def is_recording_past(self, layer_idx):
        return True  # no in-place single-token step

    def update_conv_state(self, x, layer_idx, conv_kernel_size):
        full = torch.cat((self.tail[None], x), -1)
        self.tail = full[0, :, -conv_kernel_size:]
        return full

    def update_recurrent_state(self, S, layer_idx):
        self.S = S[0]


def as_implemented(visible, config, dtype):
    """A boolean mask in the form that the base's attention takes: eager adds it to the scores."""
    if config._attn_implementation != "eager":
        return visible
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


class Row:
    """One sequence on its way through the model: everything that crosses from window to window."""

    def __init__(self, model):
        self.model, self.decoder, self.config = model.lm, model.lm.model, model.lm.config
        self.blocks, self.between, self.sleep = model.fast_weights, model.between, model.config.sleep
        self.types = getattr(self.config, "layer_types", None) or ["full_attention"] * self.config.num_hidden_layers
        self.memory = {}  # "blocks.i" or "layers.i" -> (S, tail)
        self.kv = {}  # i -> retained (k, v) [1, H, J, D]
        self.retained, self.next_position = [], 0  # position numbers of the retained keys; of the next token
        self.norm = self.decoder.norm if hasattr(self.decoder, "norm") else self.decoder.final_layernorm
        self.recent, self.span = EVICTIONS[self.sleep.eviction](self.sleep.window_size)
        self.norm_every_pass = self.config.model_type == "ouro"
        like = {"dtype": self.decoder.embed_tokens.weight.dtype}
        self.run_own = RUN_OWN_LAYER.get(self.config.model_type)
        shapes = {f"layers.{i}": own_shapes(self.decoder.layers[i]) for i in self.own_layers()}
        for i, block in self.blocks.items():
            m = block.mixer
            tail = (m.conv_dim, m.conv_size) if hasattr(m, "conv_dim") else (1, 1)
            shapes[f"blocks.{i}"] = (m.num_heads, m.head_dim, m.head_v_dim), tail
        for key, (state, tail) in shapes.items():
            self.memory[key] = torch.zeros(state, **like), torch.zeros(tail, **like)

    def own_layers(self):
        return [i for i, kind in enumerate(self.types) if kind == "linear_attention"]

    def read_window(self, ids, passes):
        """Read a window: its logits `[T, V]`. `passes` > 0: then sleep, the read being the first of them."""
        (a, b), depth = self.sleep.loop_layers, len(self.decoder.layers)
        self.positions = list(range(self.next_position, self.next_position + len(ids)))
        self.start, self.current = dict(self.memory), {}
        embedded = self.decoder.embed_tokens(ids)[None] * getattr(self.config, "embedding_multiplier", 1)
        e = self.run(range(a), embedded)
        h = self.run(range(a, b), e)
        out = self.run(range(b, depth), h)
        logits = self.model.lm_head(out if self.norm_every_pass else self.norm(out))[0]
        logits = logits * getattr(self.config, "logit_scale", 1) / getattr(self.config, "logits_scaling", 1)
        if passes > 1:
            for _ in range(passes - 1):
                h = self.run(range(a, b), BETWEEN[self.sleep.between](self.between, h, e), not self.sleep.decay_once)
            for i in range(b, depth):
                self.memory.update({key: self.start[key] for key in self.start if key.endswith(f".{i}")})
            self.run(range(b, depth), h)
        self.next_position += len(ids)
        if passes:
            self.evict()
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def run(self, layers, h, decays=True):
        """One pass of some layers over the window: S continues from `memory`, conv tails from the window's `start`."""
        for i in layers:
            layer, key = self.decoder.layers[i], f"layers.{i}"
            if key in self.memory and self.run_own is not None:
                x, self.memory[key] = self.run_own(layer, h[0], self.memory[key][0], self.start[key][1], decays)
                h = x[None]
            elif key in self.memory:
                cache = LayerCache(S=self.memory[key][0], tail=self.start[key][1])
                with mock.patch.multiple(sys.modules[type(layer).__module__], **naive(decays)):
                    h = layer(h, attention_mask=None, position_embeddings=None, **{CACHE: cache})
                self.memory[key] = (cache.S, cache.tail)
            else:
                cache, mask = LayerCache(kv=self.kv.get(i)), self.mask(i)
                h = layer(h, attention_mask=mask, position_embeddings=self.rotary(i, h), **{CACHE: cache})
                h = h[0] if isinstance(h, tuple) else h
                self.current[i] = cache.kv
            if str(i) in self.blocks:
                key = f"blocks.{i}"
                S, tail = self.memory[key][0], self.start[key][1]
                x, self.memory[key] = run_block(self.blocks[str(i)], h[0], S, tail, decays)
                h = x[None]
        ends_the_pass = layers and layers.stop == len(self.decoder.layers)
        return self.norm(h) if self.norm_every_pass and ends_the_pass else h

    def mask(self, i):
        """Mark the keys that each query may see, `[1, 1, T, J + T]`."""
        own_window = getattr(self.config, "sliding_window", None)
        if getattr(self.config, "layer_types", None) and self.types[i] != "sliding_attention":
            own_window = None
        keys = self.retained + self.positions
        visible = torch.zeros(len(self.positions), len(keys), dtype=torch.bool)
        for row, query in enumerate(self.positions):
            for column, key in enumerate(keys):
                sink = key < self.sleep.num_sink_tokens
                near = self.span is None or query - key < self.span
                inside = own_window is None or query - key < own_window
                visible[row, column] = key <= query and (sink or near) and inside
        return as_implemented(visible[None, None], self.config, self.decoder.embed_tokens.weight.dtype)

    def rotated(self, i):
        """Tell whether layer i has positions."""
        if self.config.model_type == "smollm3":
            return bool(self.config.no_rope_layers[i])
        return self.config.model_type not in ("cohere2", "exaone4") or self.types[i] == "sliding_attention"

    def rotary(self, i, h):
        """cos and sin of the window's positions, for layer i."""
        rotary = getattr(self.decoder, "rotary_emb", None)
        if rotary is None:
            return None
        positions = torch.tensor([self.positions])
        per_type = hasattr(rotary, f"{self.types[i]}_inv_freq")
        return rotary(h, positions, self.types[i]) if per_type else rotary(h, positions)

    def evict(self):
        """Drop KV; give what stays, and the next token, small position numbers again."""
        sleep, positions, p = self.sleep, self.retained + self.positions, self.next_position
        last = len(positions) - self.recent
        keep = [j for j, key in enumerate(positions) if key < sleep.num_sink_tokens or j >= last]
        cap = sleep.num_sink_tokens + (self.recent + 1 if self.recent else 0)
        shift = min(p, cap) - p
        moves = [0 if positions[j] < sleep.num_sink_tokens else shift for j in keep]
        for i, (k, v) in self.current.items():
            self.kv[i] = self.rerotate(i, k[:, :, keep], moves), v[:, :, keep]
        self.retained = [positions[j] + move for j, move in zip(keep, moves, strict=True)]
        self.next_position = p + shift

    def cut(self):
        """Let no gradient pass to what was read so far."""
        self.memory = {key: (S.detach(), tail.detach()) for key, (S, tail) in self.memory.items()}
        self.kv = {i: (k.detach(), v.detach()) for i, (k, v) in self.kv.items()}

    def rerotate(self, i, k, moves):
        """Turn keys `[1, H, J, D]` as if their tokens had stood `moves` positions further."""
        rotary = getattr(self.decoder, "rotary_emb", None)
        if rotary is None or not any(moves) or not self.rotated(i):
            return k
        per_type = f"{self.types[i]}_inv_freq"
        inv_freq = getattr(rotary, per_type) if hasattr(rotary, per_type) else rotary.inv_freq
        angle = torch.tensor(moves, dtype=torch.double)[:, None] * inv_freq.double()
        cos, sin, half = angle.cos().to(k.dtype), angle.sin().to(k.dtype), inv_freq.shape[0]
        if self.config.model_type in INTERLEAVED:
            x, y, rest = k[..., : 2 * half : 2], k[..., 1 : 2 * half : 2], k[..., 2 * half :]
            turned = torch.stack((x * cos - y * sin, y * cos + x * sin), -1).flatten(-2)
            return torch.cat((turned, rest), -1)
        x, y, rest = k[..., :half], k[..., half : 2 * half], k[..., 2 * half :]
        return torch.cat((x * cos - y * sin, y * cos + x * sin, rest), -1)


def reference_run(model, ids, sleep_passes=None, sleep_after=MappingProxyType({}), backprop_windows=None):
    """Run one row `[T]` through a sleeping model.

    Args:
        model: anything with `lm`, `fast_weights` and `config.sleep`.
        sleep_passes: N, instead of the config's; or one per token, of which the one that makes a window sleep counts.
        sleep_after: explicit sleeps: index of the token they come after, to their N.
        backprop_windows: cut the graph after every so many windows.

    Returns:
        A namespace of `logits` `[T, V]`, `memory` (name to `(S, tail)`), `positions` (of every token) and the `row`.
    """
    row, passes = Row(model), sleep_passes or model.config.sleep.sleep_passes
    passes = [passes] * len(ids) if isinstance(passes, int) else passes
    logits, positions, first, slept = [], [], 0, 0
    for t in range(len(ids)):
        full, last = t + 1 - first == model.config.sleep.window_size, t + 1 == len(ids)
        if full or last or t in sleep_after:
            sleeps = sleep_after.get(t) or (passes[t + 1] if full and not last else 0)
            logits.append(row.read_window(ids[first : t + 1], sleeps))
            slept += bool(sleeps)
            if sleeps and backprop_windows and slept % backprop_windows == 0:
                row.cut()
            positions += row.positions
            first = t + 1
    return SimpleNamespace(logits=torch.cat(logits), memory=row.memory, positions=positions, row=row)


def reference_logits(model, ids, sleep_passes=None, sleep_after=MappingProxyType({})):
    """Logits `[T, V]` of one row `[T]`."""
    return reference_run(model, ids, sleep_passes, sleep_after).logits


def reference_loss(model, rows, labels, backprop_windows=None):
    """Mean next-token loss over all targets of some rows; `labels` as in transformers (unshifted, -100 ignored)."""
    runs = [reference_run(model, ids, backprop_windows=backprop_windows) for ids in rows]
    logits = torch.cat([run.logits[:-1] for run in runs])
    return F.cross_entropy(logits, torch.cat([row[1:] for row in labels]))
