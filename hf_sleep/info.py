"""Facts about a base with sleep: its layers in running order, its memory and its cost, from its config alone."""

import copy
import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from .bases.decoder import decoder_for
from .config import SleepConfig
from .engine import Slot
from .engine.slots import Attention, BaseRecurrence, Block, Norm, WindowKV, among
from .engine.window import Append
from .lm_config import SleepLMConfig
from .memory import KV, Carried, Counters, Memory
from .modeling import SleepForCausalLM

ROLES: dict[type[Slot], str] = {Attention: "attention", BaseRecurrence: "linear", Block: "block", Norm: "norm"}


@dataclass(frozen=True)
class SlotInfo:
    """One layer in running order.

    Args:
        role: `"attention"` or `"linear"` (decoder layers of the base), `"block"` (an injected fast-weight block), or
            `"norm"` (the base's final norm, which carries nothing).
        index: the decoder layer it is, or that it follows.
        kind: of a decoder layer, the base's name for this kind.
    """

    role: str
    index: int
    kind: str

    @classmethod
    def of(cls, slot: Slot) -> "SlotInfo":
        """Describe a slot."""
        return cls(ROLES[type(slot)], slot.index, getattr(slot, "kind", ""))


@dataclass(frozen=True)
class SleepInfo:
    """A sleeping model before anyone has loaded a weight. Bytes and FLOPs are those of one sequence.

    Args:
        name: where the config came from, or `""`.
        is_checkpoint: whether it is a sleep checkpoint's config, and not a base's.
        model_type: of the base.
        hidden_size: C.
        max_positions: tokens that the base can address, or `None`.
        parameters: of the base.
        added_parameters: of the injected blocks.
        sleep: resolved against the base.
        slots: every layer in running order, injected blocks among them.
        loop: which of `slots` run in every pass of a sleep.
        dtype: of the activations, on which the bytes depend.
        kv_bytes_per_token: keys and values of one token, of all attention layers, in one pass.
        base_kv_bytes: keys and values that the plain base (Ouro: of all its loops) holds at `max_positions` tokens;
            layers with an attention window of their own hold that window.
        fast_weight_bytes: recurrent states (fp32) and convolution tails.
        window_bytes: what the next sleep starts from: hidden states of a full window, and of fast weights what a pass
            rewinds.
        read_flops: reading a full window: all slots once, no logits.
        sleep_flops: passes 2..N (under a policy, the most) over that window, and once more the slots after the loop.
        token_flops: decoding one token in the middle of a window, with its logits.
    """

    name: str
    is_checkpoint: bool
    model_type: str
    hidden_size: int
    max_positions: int | None
    parameters: int
    added_parameters: int
    sleep: SleepConfig
    slots: tuple[SlotInfo, ...]
    loop: range
    dtype: str
    kv_bytes_per_token: int
    base_kv_bytes: int | None
    fast_weight_bytes: int
    window_bytes: int
    read_flops: int
    sleep_flops: int
    token_flops: int

    @property
    def passes(self) -> int:
        """N of a sleep; under a policy, the most that it may run."""
        return most_passes(self.sleep)

    @property
    def layer_kinds(self) -> dict[str, int]:
        """Number of the base's decoder layers of each kind."""
        return dict(Counter(slot.kind for slot in self.slots if slot.role in ("attention", "linear")))

    @property
    def loop_text(self) -> str:
        """The looped decoder layers, both ends included: `"7..20 of 28"`."""
        first, end = self.sleep.loop_layers or (0, 0)
        return f"{first}..{end - 1} of {sum(self.layer_kinds.values())}"

    @property
    def added_percent(self) -> float:
        """Injected parameters, in percent of the base's."""
        return 100 * self.added_parameters / self.parameters

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV is held at most, whatever was read."""
        return self.sleep.make_eviction().most_retained + self.sleep.window_size

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values held at most."""
        return self.kv_tokens * self.kv_bytes_per_token

    @property
    def num_bytes(self) -> int:
        """Bytes held at most between two calls."""
        return self.kv_bytes + self.fast_weight_bytes + self.window_bytes

    @property
    def sleep_in_reads(self) -> float:
        """FLOPs of a sleep over those of reading its window."""
        return self.sleep_flops / self.read_flops

    @property
    def sleep_in_tokens(self) -> float:
        """FLOPs of a sleep over those of decoding one token."""
        return self.sleep_flops / self.token_flops

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary: fields and properties by name, `loop` as a flag of each of `slots`."""
        derived = ("layer_kinds", "loop_text", "added_percent", "kv_tokens", "kv_bytes", "num_bytes")
        names = [field.name for field in dataclasses.fields(self) if field.name != "loop"]
        return {name: getattr(self, name) for name in (*names, *derived, "sleep_in_reads", "sleep_in_tokens")} | {
            "sleep": self.sleep.to_dict(),
            "slots": [dataclasses.asdict(slot) | {"loops": i in self.loop} for i, slot in enumerate(self.slots)],
        }


def describe(
    config: PreTrainedConfig | SleepLMConfig,
    sleep: SleepConfig | dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> SleepInfo:
    """Describe what a model would be with sleep.

    The model is built on the meta device, which holds no values: a config of 70 billion parameters costs no memory.

    FLOPs count a multiply-add as two. They are not seconds: decoding waits for memory, and reads a window's worth of
    tokens far slower than a sleep does. A slot costs, for T tokens that see W keys (the retained ones and the T):

        2 · T · parameters that a token passes through (of E experts, as many as the router picks)
        2 · T · W · heads · (key width + value width)      attention: every query meets every key, the masked ones too
        6 · T · H · K · V                                  fast weights: S is read at k, written, and read at q
        4 · T · H · K · V                                  Mamba2's: S is written, and read at C

    A sleep leaves out what nobody wants: after the last fast weights, the last pass over a window whose KV is dropped.

    The few parameters of norms and biases count as if they were matrices. Activations, softmax, RoPE and the embedding
    are left out, and so is what a chunked kernel of the recurrence multiplies within its chunks.

    Args:
        config: of a base, or of a sleep checkpoint.
        sleep: how to sleep, as in `AutoModelForSleepLM.from_pretrained`: a dictionary sets just those fields, and of a
            sleep checkpoint the blocks cannot be changed.
        dtype: of the activations; by default the config's, or bfloat16.

    Raises:
        ValueError: an unknown family, settings that do not fit the base, or blocks other than the checkpoint's.
    """
    is_checkpoint = isinstance(config, SleepLMConfig)
    text = copy.deepcopy(config.text_config if is_checkpoint else config)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"model_type={text.model_type!r} is not a causal language model of this transformers")
    # Layers run in transformers' own choice of kernels and in bfloat16, for which all of these work without values;
    # what is measured depends on neither.
    text._attn_implementation = text._experts_implementation = None
    dtype = dtype or config.dtype or config.get_text_config().dtype or torch.bfloat16
    if is_checkpoint:
        settings = config.sleep if sleep is None else config.sleep.changed(sleep)
    else:
        settings = SleepConfig(**sleep) if isinstance(sleep, dict) else sleep or SleepConfig()
    with torch.device("meta"), torch.no_grad():
        lm = AutoModelForCausalLM.from_config(text, dtype=torch.bfloat16)
        decoder_for(lm)
        # A copy: a new config resets what its sub-configs were built with.
        # There are no values here to probe an unlisted family with.
        unprobed = SleepLMConfig(text_config=copy.deepcopy(lm.config), sleep=settings, probed={})
        model = SleepForCausalLM(unprobed, lm=lm)
        return _measure(model, config.name_or_path, is_checkpoint, dtype)


def _measure(model: SleepForCausalLM, name: str, is_checkpoint: bool, dtype: torch.dtype) -> SleepInfo:
    """Describe a model on the meta device."""
    sleeper, sleep, text = model._sleeper(), model.config.sleep, model.lm.config
    x = torch.empty(1, 1, text.hidden_size, dtype=dtype)
    start, slots = sleeper.empty(1, dtype), sleeper.order.slots
    # What every slot carries after one token.
    carried = [
        _one_token_kv(slot, x) if isinstance(slot, Attention) else state
        for slot, state in zip(slots, start.carried, strict=True)
    ]
    attention = {i: slot for i, slot in enumerate(slots) if isinstance(slot, Attention)}
    kv_bytes = {i: Memory(carried=(carried[i],)).num_bytes() for i in attention}
    positions = getattr(text, "max_position_embeddings", None)
    spans = {i: sleeper.decoder.own_window(slot.kind) for i, slot in attention.items()}

    def flops(part: range, tokens: int, keys: int) -> int:
        return sum(_slot_flops(slots[i], carried[i], tokens, keys) for i in part)

    size, order, everything = sleep.window_size, sleeper.order, range(len(slots))
    passes, keys = most_passes(sleep), sleeper.eviction.most_retained + size
    # As of a window that holds no sinks.
    sinks = sleep.num_sink_tokens
    needed = sleeper.remembered([Counters(seen=sinks + size, fill=size, retained=sleeper.eviction.most_retained)])
    again = 0
    if passes > 1:
        again = (passes - 1) * 2 * size * _count(model.between) + (passes - 2) * flops(order.loop, size, keys)
        last = among(order.loop, needed) if sleep.make_policy().at_most else order.loop
        again += flops(last, size, keys) + flops(among(order.after, needed), size, keys)
    return SleepInfo(
        name=name,
        is_checkpoint=is_checkpoint,
        model_type=text.model_type,
        hidden_size=text.hidden_size,
        max_positions=positions,
        parameters=_count(model.lm),
        added_parameters=_count(model.fast_weights) + _count(model.between),
        sleep=sleep,
        slots=tuple(map(SlotInfo.of, slots)),
        loop=order.loop,
        dtype=str(dtype).removeprefix("torch."),
        kv_bytes_per_token=sum(kv_bytes.values()),
        base_kv_bytes=positions
        and sleeper.decoder.base_loops * sum(kv_bytes[i] * min(positions, spans[i] or positions) for i in kv_bytes),
        fast_weight_bytes=Memory(carried=start.carried).num_bytes(),
        window_bytes=size * (1 + model.between.needs_loop_input) * Memory(loop_output=x).num_bytes()
        + Memory(window_start=start.window_start).num_bytes(),
        read_flops=flops(everything, size, keys),
        sleep_flops=again,
        token_flops=flops(everything, 1, keys - size // 2) + 2 * _count(model.get_output_embeddings()),
    )


def most_passes(sleep: SleepConfig) -> int:
    """N of a sleep; under a policy, the most that it may run, or where that is open the least."""
    policy = sleep.make_policy()
    return policy.at_most or policy.at_least


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _one_token_kv(slot: Attention, x: torch.Tensor) -> KV | None:
    """Ask an attention layer itself what it caches of one token."""
    kv = WindowKV(None, Append([0], [1], x.device))
    # Not Decoder.rope: RoPE that scales with the positions looks at them, and here they have no values.
    width, token = slot.decoder.rope_width(slot.kind), x.bfloat16()
    rope = None if width is None else (token.new_empty(1, 1, width),) * 2
    slot.decoder.attention_layer(slot.index, token, rope, None, kv)
    return kv.pair and KV(*(t.to(x.dtype) for t in kv.pair))


def _slot_flops(slot: Slot, carried: Carried, tokens: int, keys: int) -> int:
    """FLOPs of `tokens` tokens in one slot; a slot that carries nothing is a norm, and left out."""
    if carried is None:
        return 0
    config, decoder, module = slot.decoder.config, slot.decoder, slot.module
    passed = sum(
        p.numel() * config.num_experts_per_tok // len(p) if ".experts." in name else p.numel()
        for name, p in module.named_parameters()
    )
    if isinstance(carried, KV):
        return 2 * tokens * passed + decoder.attention_flops(slot.index, tokens, keys, carried)
    # Every block's recurrence is the gated delta rule.
    recurrence = 6 if isinstance(slot, Block) else decoder.recurrence_flops
    return tokens * (2 * passed + recurrence * carried.recurrent_state.numel())
