"""A base and its adapter over the same tokens, stage by stage, bit for bit."""

from typing import Any, NoReturn

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ..compat import CACHE
from ..memory import KV
from ..registry import BASES
from .decoder import Decoder, what_an_adapter_needs

STEPS = (1, 1, 3, 1)
"""Tokens of the calls that follow a prefill."""

NEEDS = {
    "embedding": "override embed or first_input",
    "between": "override attention_layer",
    "RoPE": "override rope",
    "mask": "override own_window and, where layers differ, layer_kinds",
    "layer": "override attention_layer",
    "keys": "override frequencies or shift_keys, and where layers differ layer_kinds",
    "norm": "override norm",
    "logits": "override logits",
}


class Trace:
    """Inputs and outputs of a base's parts in one forward.

    Args:
        inputs: what each layer read `[B, T, C]`.
        settings: keywords that each layer was given, its mask and RoPE among them.
        outputs: what each layer made of it.
        normed: what came out of the final norm.
    """

    def __init__(self, lm: PreTrainedModel, decoder: Decoder):
        self.lm, self.decoder = lm, decoder
        self.inputs: list[Any] = []
        self.settings: list[dict[str, Any]] = []
        self.outputs: list[Any] = []
        self.normed: torch.Tensor | None = None

    def run(self, **arguments: Any) -> torch.Tensor:
        """The base's logits."""

        def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.inputs.append(args[0] if args else kwargs["hidden_states"])
            self.settings.append(kwargs)

        def after(_: nn.Module, __: Any, output: Any) -> None:
            self.outputs.append(output)

        def after_norm(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            self.normed = output

        handles = [self.decoder.model.norm.register_forward_hook(after_norm)]
        for layer in self.decoder.layers:
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(after))
        try:
            return self.lm(**arguments).logits
        finally:
            for handle in handles:
                handle.remove()


class Append:
    """Stands in for a cache while one layer runs: its new keys and values come after the old ones."""

    def __init__(self, held: KV | None):
        self.pair = held
        self.calls = 0

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> KV:
        self.calls += 1
        if self.pair is not None:
            keys, values = torch.cat((self.pair.keys, keys), -2), torch.cat((self.pair.values, values), -2)
        self.pair = KV(keys, values)
        return self.pair


class Comparison:
    """Runs a base and its adapter over the same tokens.

    Args:
        where: how errors begin.
    """

    def __init__(self, lm: PreTrainedModel, decoder: Decoder, where: str):
        self.lm, self.decoder, self.where = lm, decoder, where
        self.case = ""
        self.arguments: dict[str, Any] = {}

    def read(
        self,
        case: str,
        ids: torch.Tensor,
        first: int = 0,
        counts: list[int] | None = None,
        cache: DynamicCache | None = None,
        held: list[KV | None] | None = None,
    ) -> list[KV | None]:
        """Read tokens in one call.

        Args:
            case: how errors name it.
            ids: `[B, T]`.
            first: the position of the first one.
            counts: tokens per row, pads after them; `None`: all.
            cache: what the base has read before.
            held: what the adapter's layers hold of it.

        Returns:
            What they hold now.
        """
        batch, width = ids.shape
        positions = torch.arange(first, first + width, device=ids.device).unsqueeze(0)
        arguments: dict[str, Any] = {"input_ids": ids, "use_cache": cache is not None}
        real = torch.ones_like(ids)
        if counts is not None:
            real = (torch.arange(width, device=ids.device) < torch.tensor(counts, device=ids.device)[:, None]).long()
            arguments["attention_mask"] = real
        if cache is not None:
            arguments[CACHE] = cache
        elif first:
            arguments["position_ids"] = positions.expand(batch, -1)
        self.case, self.arguments = case, arguments
        trace = Trace(self.lm, self.decoder)
        expected = trace.run(**arguments)
        if len(trace.inputs) != len(self.decoder.layers):
            self._fail("layer", f"the base called its {len(self.decoder.layers)} layers {len(trace.inputs)} times")
        x = self.decoder.embed(ids)
        self._same("embedding", "the embedding", x, trace.inputs[0], real)
        x, now = self._layers(trace, x, positions, held or [None] * len(self.decoder.layers), real)
        normed = self.decoder.norm(x)
        self._same("norm", "the final norm", normed, trace.normed, real)
        logits = self.decoder.logits(normed if self.decoder.norm_every_pass else x)
        self._same("logits", "the logits", logits, expected, real)
        return now

    def _layers(
        self, trace: Trace, x: torch.Tensor, positions: torch.Tensor, pasts: list[KV | None], real: torch.Tensor
    ) -> tuple[torch.Tensor, list[KV | None]]:
        """Run all layers after what they hold in `pasts`, and compare each with the base's."""
        ropes = {kind: self._rope(x, positions, kind) for kind in set(self.decoder.kinds)}
        now: list[KV | None] = []
        for i, (kind, past) in enumerate(zip(self.decoder.kinds, pasts, strict=True)):
            if i:
                self._same("between", f"what the base does between layers {i - 1} and {i}", x, trace.inputs[i], real)
            self._same_rope(i, ropes[kind], trace.settings[i].get("position_embeddings"))
            mask = self._mask(kind, x, 0 if past is None else past.keys.shape[-2], real)
            made, kv = self._layer(i, x, ropes[kind], mask, past)
            if not _equal(made, trace.outputs[i], real):
                again, _ = self._layer(i, x, ropes[kind], trace.settings[i].get("attention_mask"), past)
                is_mask = _equal(again, trace.outputs[i], real)
                place = ("mask", f"the mask of layer {i}") if is_mask else ("layer", f"layer {i}")
                self._same(*place, made, trace.outputs[i], real)
            x = made
            now.append(kv)
        return x, now

    def decode(self, ids: torch.Tensor, prefill: int, cache: DynamicCache) -> None:
        """Read `prefill` tokens through a cache, and the others after them in calls of `STEPS`."""
        held, done = None, 0
        for count in (prefill, *STEPS):
            case = f"{count} tokens after {done} through a cache"
            held = self.read(case, ids[:, done : done + count], done, cache=cache, held=held)
            done += count

    def shift(self, ids: torch.Tensor) -> None:
        """Check in every layer that shifted keys are those that RoPE makes at the other positions."""
        self.case = "cached keys given other positions"
        trace = Trace(self.lm, self.decoder)
        trace.run(input_ids=ids, use_cache=False)
        for i, kind in enumerate(self.decoder.kinds):
            x = trace.inputs[i]
            pairs = []
            for first in (9, 0, 14):
                positions = torch.arange(first, first + ids.shape[1], device=ids.device).unsqueeze(0)
                mask = self._mask(kind, x, 0, torch.ones_like(ids))
                pairs.append(self._layer(i, x, self._rope(x, positions, kind), mask, None)[1])
            keys, values = pairs[0]
            for by, other in ((-9, pairs[1]), (5, pairs[2])):
                if not torch.equal(values, other.values):
                    self._fail("layer", f"the values of layer {i} depend on positions, so that they cannot be shifted")
                try:
                    turned = self.decoder.shift_keys(keys, torch.tensor([by]), kind)
                except RuntimeError as error:
                    self._fail("keys", f"the keys of layer {i} cannot be shifted as RoPE would ({error})", error)
                off = float((turned - other.keys).abs().max() / other.keys.abs().max())
                # A rounding of the keys, and RoPE's tables are of float32 angles.
                if not off <= 8 * torch.finfo(keys.dtype).eps + 1e-5:
                    self._fail(
                        "keys", f"the keys of layer {i}, shifted by {by} positions, are off by {off:.3g} of the largest"
                    )

    def _rope(self, x: torch.Tensor, positions: torch.Tensor, kind: str) -> Any:
        try:
            return self.decoder.rope(x, positions, kind)
        except Exception as error:
            self._fail("RoPE", f"RoPE of {kind} layers cannot be made alone ({type(error).__name__}: {error})", error)

    def _layer(self, index: int, x: torch.Tensor, rope: Any, mask: Any, past: KV | None) -> tuple[torch.Tensor, KV]:
        kv = Append(past)
        made: Any
        try:
            made = self.decoder.attention_layer(index, x, rope, mask, kv)
        except Exception as error:
            self._fail("layer", f"layer {index} cannot be run alone ({type(error).__name__}: {error})", error)
        if not isinstance(made, torch.Tensor):
            self._fail("layer", f"layer {index} gives a {type(made).__name__}, and not hidden states")
        if kv.calls != 1 or kv.pair is None:
            self._fail("layer", f"layer {index} called {CACHE}.update {kv.calls} times, and not once")
        return made, kv.pair

    def _mask(self, kind: str, x: torch.Tensor, held: int, real: torch.Tensor) -> torch.Tensor | None:
        """The mask of one kind of layer, `[B, 1, T, held + T]`; `None` where plain causality says it all."""
        width, window = real.shape[1], self.decoder.own_window(kind)
        implementation = self.decoder.attention_implementation
        # As transformers has it: with exactly the window's tokens there is a mask, which hides nothing.
        in_reach = bool(real.all()) and (window is None or held + width < window)
        eager = implementation == "eager"
        if implementation not in ("sdpa", "eager") or (in_reach and (width == 1 or not (held or eager))):
            return None
        query = torch.arange(held, held + width, device=x.device)[:, None]
        key = torch.arange(held + width, device=x.device)
        visible = key <= query
        if window is not None:
            visible &= query - key < window
        seen = torch.cat((real.new_ones(len(real), held), real), 1).bool().to(x.device)
        visible = visible[None, None] & seen[:, None, None]
        if eager:
            return torch.zeros_like(visible, dtype=x.dtype).masked_fill(~visible, torch.finfo(x.dtype).min)
        return visible

    def _same_rope(self, index: int, ours: Any, theirs: Any) -> None:
        if not isinstance(theirs, tuple) or ours is None:
            return
        for name, a, b in zip(("cos", "sin"), ours, theirs, strict=False):
            self._same("RoPE", f"RoPE's {name} in layer {index}", a, b)

    def _same(self, part: str, place: str, ours: Any, theirs: Any, real: torch.Tensor | None = None) -> None:
        if _equal(ours, theirs, real):
            return
        if not isinstance(theirs, torch.Tensor) or ours.shape != theirs.shape:
            shape = tuple(theirs.shape) if isinstance(theirs, torch.Tensor) else type(theirs).__name__
            self._fail(part, f"{place} gives {tuple(ours.shape)}, and the base {shape}")
        difference = (ours.to(theirs.device) - theirs).float().abs()
        if real is not None:
            difference = difference[real.bool().to(difference.device)]
        repeated = Trace(self.lm, self.decoder).run(**self.arguments) if CACHE not in self.arguments else None
        if repeated is not None and not _equal(repeated, Trace(self.lm, self.decoder).run(**self.arguments)):
            raise ValueError(
                f"model_type={self.lm.config.model_type!r} cannot be probed on {self.lm.device}: the base does not "
                "repeat itself there bit for bit. Retrofit it on a CPU"
            )
        self._fail(part, f"the first difference is in {place}, of up to {difference.max():.3g}")

    def _fail(self, part: str, what: str, cause: Exception | None = None) -> NoReturn:
        family = self.lm.config.model_type
        place = f"does not compute what the base computes: {self.where}{self.case}: {what}"
        if family in BASES:
            raise ValueError(f"{type(self.decoder).__name__} {place}. It must {NEEDS[part]}") from cause
        raise ValueError(
            f"model_type={family!r} is not listed, and the plain adapter {place}. An adapter must {NEEDS[part]}. "
            f"{what_an_adapter_needs(family)}"
        ) from cause


def _equal(ours: Any, theirs: Any, real: torch.Tensor | None = None) -> bool:
    """Tell whether two tensors are equal bit for bit, of `[B, T, …]` where `real` is not zero."""
    if not isinstance(theirs, torch.Tensor) or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    ours = ours.to(theirs.device)
    if real is not None:
        chosen = real.bool().to(theirs.device)
        ours, theirs = ours[chosen], theirs[chosen]
    return torch.equal(ours, theirs)
