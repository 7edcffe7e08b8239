"""`generate` with a sleeping model: its cache, and a conversation that the cache has read a part of."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from transformers.generation import UnbatchedClassifierFreeGuidanceLogitsProcessor

from ..cache import SleepCache
from ..compat import CACHE, GenerationMixin
from ..engine import of_cache
from ..generation import RecurrentGenerationMixin
from ..packing import refuse_packed
from ..static_cache import StaticSleepCache
from .inputs import check_cache, check_marks, check_rows, memory_in


@contextmanager
def kept_on_error(cache: SleepCache | None) -> Iterator[None]:
    """Put a cache back as it was where what follows ends in an error, or is interrupted."""
    before = SleepCache() if cache is None else cache.fork()
    try:
        yield
    except BaseException:
        if cache is not None:
            cache.become(before)
        raise


@contextmanager
def experts_run(lm: Any, how: dict[str, Any]) -> Iterator[None]:
    """Run a base's experts in one way, and then in the one before."""
    before = lm.get_experts_implementation()
    lm.set_experts_implementation(how)
    try:
        yield
    finally:
        lm.set_experts_implementation(before)


class SleepGenerationMixin(RecurrentGenerationMixin):
    """`generate` with a `SleepCache`; everything else of it is transformers' own."""

    lm: Any
    _policy: Any
    on_sleep: Any
    _experts_outside: dict[str, Any] | None = None
    """How experts run where nothing is decoded, while something is."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        made = generation_config.cache_implementation
        if made not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={made!r} cannot hold fast weights: leave it unset, a SleepCache is made and is "
                "bounded anyway, or use 'static' to compile decoding"
            )
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(
                "attention_mask ends with pads, and generate continues from the last column: pad prompts on the left "
                "(tokenizer.padding_side = 'left')"
            )
        # Where the generation config has such an entry, generate has put the keyword there.
        passes = model_kwargs.setdefault("sleep_passes", getattr(generation_config, "sleep_passes", None))
        self._policy(passes)
        generation_config.use_cache = generation_config.use_cache is not False
        if (given := model_kwargs.get(CACHE)) is not None:
            check_cache(given, self)
            usual = self.generation_config
            # What the call says contradicts a cache; what the model's own config says gives way to it.
            if not generation_config.use_cache and usual.use_cache is not False:
                raise ValueError("use_cache=False and a cache contradict each other: leave one of them out")
            generation_config.use_cache = True
            if made not in (
                None,
                usual.cache_implementation,
                "static" if isinstance(given, StaticSleepCache) else None,
            ):
                raise ValueError(
                    f"cache_implementation={made!r} and a {type(given).__name__} contradict each other: leave one out"
                )
            # It outlives the call, so a stop that is noticed a step late must not be taken back from it: it cannot be.
            given._is_user_defined = True
        elif generation_config.use_cache:
            model_kwargs[CACHE] = StaticSleepCache() if made == "static" else SleepCache()
        if generation_config.compile_config is not None:
            # transformers compiles on a CPU only where its private flag says so. Who passes a config means it.
            generation_config.compile_config = asked = copy.copy(generation_config.compile_config)
            asked._compile_all_devices = True

    @staticmethod
    def create_masks_for_generate(*_: Any, attention_mask: torch.Tensor | None = None, **__: Any) -> Any:
        """The mask as it is. generate would make a stock model's for a cache that compiles; this one makes its own."""
        return attention_mask

    def _prefill(
        self, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict, *args: Any, **kw: Any
    ) -> Any:
        """Check a conversation against what its cache has read, before anything of it is read."""
        embeds, mask, cache = (model_kwargs.get(name) for name in ("inputs_embeds", "attention_mask", CACHE))
        batch, width = (input_ids if embeds is None else embeds).shape[:2]
        held = memory_in(cache, self)
        check_rows(held, batch)
        if embeds is not None:
            # It would cut the ids, of which there are none. Windows bound what is read at once anyway.
            generation_config.prefill_chunk_size = None
        if held.counters:
            # A mask of ones generate has dropped by now.
            said = generation_config._mask_length if mask is None else mask.shape[1]
            is_whole = embeds is not None or said == width
            if is_whole and width == held.columns:
                raise ValueError(
                    f"cache has read all {width} columns of the input: there is nothing new to read. Append the next "
                    "question to the conversation"
                )
            if width < held.columns if is_whole else said != held.columns + width:
                raise ValueError(
                    f"cache has read {held.columns} columns, the input has {width} and attention_mask {said}. With a "
                    "cache, generate takes the whole conversation, of which it reads what is new; or, as input_ids, "
                    "new text alone with an attention_mask over both: "
                    f"attention_mask=torch.ones({len(held.counters)}, {held.columns + width}, dtype=torch.long)"
                )
            held.check_past(None if mask is None else mask[:, : held.columns])
        if (after := model_kwargs.get("sleep_after")) is not None:
            check_marks(after)
            if after.dim() != 2 or after.shape[1] != width:
                raise ValueError(
                    f"sleep_after has shape {tuple(after.shape)}: it must be [B, {width}], as the input is"
                )
            if held.counters and not is_whole:
                # In columns of the conversation, as a whole one is.
                model_kwargs["sleep_after"] = F.pad(after, (held.columns, 0))
        if (positions := model_kwargs.pop("position_ids", None)) is not None:
            refuse_packed({"position_ids": positions}, mask)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kw)

    def _sample(self, *args: Any, streamer: Any = None, **kwargs: Any) -> Any:
        # The one mode that streams: transformers refuses a streamer with beams.
        cache, hook = kwargs.get(CACHE), getattr(streamer, "on_sleep", None)
        with kept_on_error(cache), nullcontext() if hook is None else self.on_sleep(of_cache(cache, hook)):
            return super()._sample(*args, streamer=streamer, **kwargs)

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE)
        before = SleepCache() if cache is None else cache.fork()
        try:
            return super()._beam_search(*args, **kwargs)
        finally:
            # What beams have read last is not what is returned: whoever goes on reads the sequences returned.
            if cache is not None:
                cache.become(before)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        processors = super()._get_logits_processor(*args, **kwargs)
        passes = (kwargs.get("model_kwargs") or {}).get("sleep_passes")
        for i, processor in enumerate(processors):
            is_guided = isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
            if is_guided and processor.model is self:  # it calls this model too
                processors[i] = copy.copy(processor)
                processors[i].model = functools.partial(self, sleep_passes=passes)
        return processors

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: torch.Tensor, generation_config: Any, model_kwargs: dict
    ) -> torch.Tensor:
        """Infer a mask where none was given.

        Raises:
            ValueError: it cannot be meant so.
        """
        mask = super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        cache = model_kwargs.get(CACHE)
        # In what a cache has read, a row that ended has pads behind it.
        new = mask[:, -1:] if isinstance(cache, SleepCache) and not cache.is_empty else mask
        if not new.shape[1]:
            return mask
        for row in ((new[:, 1:] < new[:, :-1]).any(1) | (new[:, -1] == 0)).nonzero()[:1, 0].tolist():
            where = "after its first token" if bool(new[row].any()) else "and nothing else"
            raise ValueError(
                f"without an attention_mask generate takes token {int(generation_config._pad_token_tensor)}, the "
                f"pad_token_id, for a pad, and row {row} of the input has it {where}: pad prompts on the left, leave "
                "out empty ones, and where it is text pass attention_mask=torch.ones_like(input_ids)"
            )
        return mask

    @contextmanager
    def _optimize_model_for_decode(self) -> Iterator[None]:
        outside = self.lm.get_experts_implementation()
        with super()._optimize_model_for_decode():
            self._experts_outside = None if outside == self.lm.get_experts_implementation() else outside
            try:
                yield
            finally:
                self._experts_outside = None

    def _around_sleep(self) -> Callable[[], AbstractContextManager]:
        """What a sleep runs in: it reads a window, and for each token of it decoding's way would copy an expert."""
        outside = self._experts_outside
        return nullcontext if outside is None else functools.partial(experts_run, self.lm, outside)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        width = (inputs["inputs_embeds"] if inputs["input_ids"] is None else inputs["input_ids"]).shape[1]
        if (after := inputs.pop("sleep_after", None)) is not None:
            first = 0 if (cache := inputs.get(CACHE)) is None else int(cache.get_seq_length())
            # What is generated has no marks.
            if first < after.shape[1]:
                inputs["sleep_after"] = F.pad(after, (0, width))[:, first : first + width]
        if (mask := inputs.get("attention_mask")) is not None:
            # What it says of the past was checked before generate began.
            inputs["attention_mask"] = mask[:, -width:]
        return inputs
