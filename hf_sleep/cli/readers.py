"""What `bench` reads a text with: a model that sleeps, its base with a whole KV cache, and StreamingLLM."""

from typing import Any

import torch
from transformers import DynamicCache

from ..bases import decoder_for
from ..cache import SleepCache
from ..checks import reject
from ..compat import CACHE


class Sleeping:
    """A model that sleeps.

    Args:
        model: a `SleepForCausalLM`.
        passes: N; by default the model's own.
    """

    def __init__(self, model: Any, passes: int | None = None):
        self.model, self.cache = model, SleepCache()
        self.how = {} if passes is None else {"sleep_passes": passes}
        self.sleeps: list[float] = []

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        with self.model.on_sleep(lambda event: self.sleeps.append(event.seconds)):
            return self.model(ids, cache=self.cache, logits_to_keep=1, **self.how).logits

    def num_bytes(self) -> int:
        return self.cache.num_bytes()


class FullCache:
    """A base, with the KV of all it has read."""

    def __init__(self, lm: Any):
        self.lm, self.cache = lm, None
        self.sleeps: list[float] = []

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        output = self.lm(ids, use_cache=True, logits_to_keep=1, **{CACHE: self.cache})
        self.cache = output[CACHE]
        return output.logits

    def num_bytes(self) -> int:
        """Bytes of all its tensors: keys and values, and states of linear layers."""
        return cache_bytes(self.cache)


class StreamingLLM:
    """A base that keeps the KV of its first tokens and of the last ones. A key's position is its place among them.

    It reads and evicts a quarter of `most` at a time, and never holds more than `most` tokens. Larger blocks would show
    it fewer of the last tokens, and cost less.

    Args:
        lm: a base, of whose attention layers none has a window of its own.
        most: tokens whose KV is held.
        sinks: first tokens, which stay.

    Raises:
        ValueError: a base with other layers, or too few tokens.

    Source: Xiao et al. 2024 (arXiv 2309.17453).
    """

    def __init__(self, lm: Any, most: int, sinks: int = 4):
        self.decoder, self.most, self.num_sinks, self.block = decoder_for(lm), most, sinks, most // 4
        if others := set(self.decoder.kinds) - {"full_attention"}:
            works = f"StreamingLLM is for full attention, and the base has {', '.join(sorted(others))} layers"
            raise ValueError(works)
        if self.decoder.base_loops > 1:
            raise ValueError(
                f"StreamingLLM is for a KV cache of one pass, and the base loops {self.decoder.base_loops} times"
            )
        if self.recent < 1:
            raise reject("StreamingLLM.most", most, f"it must leave room for more than {sinks} sinks and a block")
        self.lm, self.cache = lm, DynamicCache()
        self.sleeps: list[float] = []

    @property
    def recent(self) -> int:
        """Tokens that an eviction leaves, sinks not counted."""
        return self.most - self.block - self.num_sinks

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        for block in ids.split(self.block, dim=1):
            if self.cache.get_seq_length() + block.shape[1] > self.most:
                self._evict()
            logits = self.lm(block, use_cache=True, logits_to_keep=1, **{CACHE: self.cache}).logits
        return logits

    def _evict(self) -> None:
        shift = torch.tensor([self.num_sinks + self.recent - self.cache.get_seq_length()])
        for layer, kind in zip(self.cache.layers, self.decoder.kinds, strict=True):
            keys = self.decoder.shift_keys(layer.keys[..., -self.recent :, :], shift, kind)
            layer.keys = torch.cat((layer.keys[..., : self.num_sinks, :], keys), dim=-2)
            values = layer.values[..., : self.num_sinks, :], layer.values[..., -self.recent :, :]
            layer.values = torch.cat(values, dim=-2)

    def num_bytes(self) -> int:
        return cache_bytes(self.cache)


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors of a cache of transformers."""
    layers: Any = getattr(cache, "layers", ())
    tensors = [value for layer in layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
