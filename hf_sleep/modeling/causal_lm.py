"""SleepForCausalLM: a pretrained decoder LM that sleeps."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..bases.decoder import Decoder, decoder_for
from ..bases.probe import probe, require_probed
from ..cache import SleepCache
from ..compat import CACHE, BaseModelOutputWithPast, CausalLMOutputWithPast, takes_cache
from ..config import SleepConfig
from ..engine import PassHook, PassPolicy, SleepHook, Watchers, pass_policy, running_order
from ..hub import TAGS, CardFacts
from ..layers.block import keeping
from ..lm_config import SleepLMConfig
from ..placement import check_whole, is_sharded, lengths_in_step
from ..registry import BASES
from ..sleep import Sleeper
from ..state import fingerprint
from ..weights import checksum
from .advice import Advice, warn_if_emulated
from .checkpoint import CheckpointMixin
from .compiling import CompiledCall, sealed, uncompiled
from .generation import SleepGenerationMixin
from .headless import Headless
from .inputs import check_inputs, check_keywords, check_positions, check_settings, ends_of, memory_in
from .outputs import Asked, TokenLoss, answer, mean_loss, reaching
from .plain import plain_base, source_of
from .pretrained import draw_blocks

# What PEFT, accelerate and transformers ask a model to learn how its linear layers are stored.
QUANTISATION = {"is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"}


class SleepForCausalLM(CheckpointMixin, SleepGenerationMixin):
    """A base decoder LM (`lm`, untouched) with fast-weight blocks (`fast_weights`), run window by window.

    Make one from a base with `AutoModelForSleepLM.from_pretrained`, or from a model in memory with `from_base`.

    Args:
        config: how it is built and how it sleeps.
        lm: the base model; built from `config.text_config` where it is not given.

    Source: Lee et al. 2026 (arXiv 2605.26099).
    """

    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["FastWeightBlock"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _is_stateful = True

    def __init__(self, config: SleepLMConfig, lm: PreTrainedModel | None = None):
        super().__init__(config)
        self.lm = AutoModelForCausalLM.from_config(config.text_config) if lm is None else lm
        self.fast_weights, self.between = self.make_blocks(), self.make_between()
        self.keep_in_fp32(decoder_for(self.lm).fp32_parameters)
        require_probed(config.text_config.model_type, config.probed)
        self.card, self.model_tags = CardFacts(), list(TAGS)
        self.gradient_checkpointing = False
        self._pass_hooks: dict[int, PassHook] = OrderedDict()
        self._sleep_hooks: dict[int, SleepHook] = OrderedDict()
        self._advice = Advice(is_fresh=lm is not None)
        if lm is None:
            self.post_init()

    @classmethod
    def from_base(
        cls, base: PreTrainedModel, sleep: SleepConfig | None = None, probed: dict[str, Any] | None = None
    ) -> "SleepForCausalLM":
        """Retrofit a loaded base model: wrap it and give it fresh fast-weight blocks that add nothing yet.

        The blocks follow from the base's weights alone: whoever loads the same base as it was loaded here gets the same
        model. For others, as seeds of an experiment, draw them from torch's generator with `block.init_weights(std)`
        for every block of `model.fast_weights.values()`.

        Args:
            base: a causal LM, on any device, quantised or not. It is wrapped, not copied. One of a family that is not
                listed is probed first: its layers, run one by one, must compute what its own forward computes.
            sleep: how to sleep; defaults to `SleepConfig()`.
            probed: what an earlier probe of an unlisted family found, with which it is not probed again.

        Raises:
            ValueError: no causal LM, a family that needs an adapter, or settings that do not fit the base.
        """
        base = plain_base(base)
        decoder_for(base)
        probed = None if base.config.model_type in BASES else probed or probe(base).to_dict()
        # A new config resets what its sub-configs were loaded with.
        attention, experts = base.config._attn_implementation, base.config._experts_implementation
        config = SleepLMConfig(
            text_config=base.config,
            sleep=sleep or SleepConfig(),
            base_model_name_or_path=source_of(base.config._name_or_path),
            base_fingerprint=fingerprint(base),
            base_checksum=checksum(base),
            dtype=base.dtype,
            use_cache=getattr(base.config, "use_cache", True),
            probed=probed,
        )
        config._attn_implementation, config._experts_implementation = attention, experts
        state = torch.get_rng_state()
        with torch.device("cpu"):
            model = cls(config, lm=base)
        torch.set_rng_state(state)  # what the new modules drew is drawn again below
        draw_blocks(model, base)
        for module in base.modules():
            # What was put into it after it was loaded, as an adapter is, would be drawn again below.
            module._is_hf_initialized = True
            # The base's own checkpointing drops its cache in training: the wrapper's takes over.
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing, model.gradient_checkpointing = False, True
        model.generation_config = base.generation_config
        for name in QUANTISATION.intersection(dir(base)):
            setattr(model, name, getattr(base, name))
        model.post_init()
        return model.train(base.training)

    def post_init(self) -> None:
        super().post_init()
        # A text model names its vision tower's layers too, which FSDP would look for.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(present.intersection(self._no_split_modules))
        self._tied_weights_keys = dict(self.all_tied_weights_keys)  # the base's: PEFT asks the whole model

    def _apply(self, fn: Callable, recurse: bool = True) -> "SleepForCausalLM":
        # What loading in 16 bits keeps: the gates, a hybrid base's too, and what is computed and not loaded, as RoPE's
        # frequencies are.
        of_base = self.decoder.fp32_parameters
        kept = [p for name, p in self.lm.named_parameters() if name.rpartition(".")[2] in of_base]
        kept += [buffer for _, buffer in self.named_non_persistent_buffers()]
        return super()._apply(keeping(fn, kept), recurse)

    @property
    def decoder(self) -> Decoder:
        """The adapter that runs the base's layers."""
        return decoder_for(self.lm)

    @property
    def base_model(self) -> Headless:
        """This model without its head. Not the base's decoder, which would read without sleep."""
        return Headless(self)

    def _get_name(self) -> str:
        # Trainer's label smoothing knows a causal LM by it, and FSDP2 puts a class of its own before this one.
        return SleepForCausalLM.__name__

    def _sleeper(self, cache: Any = None) -> Sleeper:
        """The algorithm, over this model's layers and with its settings, in a call that moves `cache` on."""
        sleep, decoder = self.config.sleep, self.decoder
        loop_layers = sleep.loop_layers or (0, len(decoder.kinds))
        return Sleeper(
            decoder,
            running_order(decoder, dict(self.fast_weights.items()), loop_layers),
            sleep.make_eviction(),
            self.between,
            Watchers(tuple(self._pass_hooks.values()), tuple(self._sleep_hooks.values()), cache),
            decay_once=sleep.decay_once,
            is_checkpointing=self.gradient_checkpointing and self.training,
            around_sleep=self._around_sleep(),
        )

    def _policy(self, sleep_passes: int | PassPolicy | None) -> PassPolicy:
        """The pass policy of a call."""
        return pass_policy(self.config.sleep.sleep_passes if sleep_passes is None else sleep_passes)

    def on_sleep(self, hook: SleepHook) -> RemovableHandle:
        """Watch the sleeps of every call: for a progress bar over a long text, or to know what they cost.

        Args:
            hook: `hook(event)` is called when a sleep is over, once per row that slept, in `forward`, `generate` and
            `sleep` alike. A `SleepEvent` has `row`, `tokens` read so far, `seconds` and `sleep_passes`. What the hook
            raises ends the call, and leaves the caller's cache as it was.

        Returns:
            A handle whose `remove()` ends it; in a `with` statement it ends with the block.
        """
        handle = RemovableHandle(self._sleep_hooks)
        self._sleep_hooks[handle.id] = hook
        return handle

    def register_pass_hook(self, hook: PassHook) -> RemovableHandle:
        """Watch the passes of every sleep.

        Args:
            hook: `hook(event)` is called after each pass over a window that sleeps; the ordinary read is number 1. A
            `PassEvent` has its `number`, the fast weights that it left (`written`), what it made of the window (`z`)
            and what pass 1 read there (`e`), a row per sequence that sleeps. They are part of the graph, and must not
            be changed. A hook on one of them, for its gradient, must not hold one: that is a cycle through the graph,
            which no collector sees.

        Returns:
            A handle whose `remove()` ends it.
        """
        handle = RemovableHandle(self._pass_hooks)
        self._pass_hooks[handle.id] = hook
        return handle

    @contextmanager
    def sleeping(self, **settings: Any) -> Iterator["SleepForCausalLM"]:
        """Sleep with other settings inside a `with` block, and with the old ones again after it; in one thread.

        Args:
            settings: fields of `SleepConfig` other than the blocks': `model.sleeping(sleep_passes=3, eviction="hard")`.

        Raises:
            ValueError: settings that do not fit the base, or other blocks; nothing has changed then.
        """
        before = self.config.sleep
        self.config.sleep = before.changed(settings).resolve(self.config.text_config)
        try:
            yield self
        finally:
            self.config.sleep = before

    def slot_devices(self) -> list[torch.device]:
        """Device of each layer's cache, in running order."""
        return [slot.device for slot in self._sleeper().order.slots]

    def fast_slots(self) -> frozenset[int]:
        """Layers that carry fast weights, by their place in the running order."""
        return self._sleeper().order.fast_slots

    def get_input_embeddings(self) -> nn.Module:
        return self.lm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.lm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm.set_output_embeddings(new_embeddings)

    @sealed
    @takes_cache
    @uncompiled
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: SleepCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        sleep_passes: int | PassPolicy | None = None,
        backprop_windows: int | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_dict: bool | None = None,
        position_ids: torch.Tensor | None = None,
        skip_head: bool = False,
        sleep_after: torch.Tensor | None = None,
        token_loss: TokenLoss | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | BaseModelOutputWithPast | tuple:
        """Read tokens; sleep whenever a window is full and another token comes.

        Args:
            input_ids: `[B, T]` token ids.
            attention_mask: `[B, T]`, or `[B, past + T]`, whose past must be what was read with. It is compared column
                by column, so the first is cheaper. 0 at pads, which may stand at either end.
            cache: the cache to continue from. It is moved on, and left as it was when an error is raised.
            inputs_embeds: `[B, T, C]` instead of `input_ids`.
            labels: `[B, T]`, -100 where ignored; logits at a token predict the label of the next, in whatever window.
                Targets at pads are ignored.
            use_cache: return a cache; by default when one was passed, and where `config.use_cache` says so, as in stock
                models: not in training with gradient checkpointing, nor where weights are sharded over ranks.
            logits_to_keep: how many of the last columns need logits; 0 for all, an empty tensor for none, as in stock
                models: to read what nothing is asked of yet.
            sleep_passes: N for the sleeps of this call, or a policy; by default the config's.
            backprop_windows: truncated backpropagation: a row's gradient is cut after every so many of its sleeps in
                this call. By default it is whole, as in the paper.
            num_items_in_batch: what to divide the summed loss by, as Trainer counts it: the labels of all rows that
                share an optimizer step, but for their first column. Of those that nothing predicts, at a left-padded
                row's first token, the share is taken out that they have here. By default the number of targets.
            return_dict: `False` for a tuple.
            position_ids: `[B, T]` or `[1, T]`, counting up over a row's tokens; a model that sleeps numbers them
                itself, so this is only checked.
            skip_head: return a `BaseModelOutputWithPast` with `last_hidden_state` `[B, T or logits_to_keep, C]`, what
                the output embeddings read, as in stock models: a base that scales or caps its logits does it after.
            sleep_after: `[B, T]`, 1 at a token after which its row sleeps, whatever its window holds: at the end of a
                document or a turn. The same as ending the call there and calling `sleep`, with gradients; 0 elsewhere
                and at pads. Not where weights are sharded over ranks.
            token_loss: `token_loss(logits, targets, rows, columns)`, the summed loss of n targets, instead of their
                cross-entropy: to distil, or to weight tokens. `logits` are `[n, vocab]`, in float32 at least, those of
                row `rows[i]` `[n]` of the call at its column `columns[i]` `[n]`, pads counted, and `targets` `[n]` the
                labels of the columns after these. It is called once a window, of the targets there, and again in the
                backward with gradient checkpointing, and returns a scalar. The mean is still made here.
            kwargs: what stock models take and ignore (`token_type_ids`, `cache_position`), and what they take for
                packed samples or for attentions and hidden states, which is refused.

        Returns:
            `CausalLMOutputWithPast` with `logits` `[B, T or logits_to_keep, vocab]` (zeros at pads), `loss` and
            `cache`. In training with `labels`, `logits` is `None`, as they are made only where a target wants them; an
            explicit `logits_to_keep` asks for them all the same.

        Raises:
            ValueError: for input that cannot be read, before anything has changed.
            TypeError: for an unknown keyword.

        Source: Lee et al. 2026, Alg. 1.
        """
        check_whole(self)
        check_keywords(type(self).__name__, kwargs)
        check_settings(logits_to_keep, backprop_windows, skip_head, labels, token_loss)
        policy, memory = self._policy(sleep_passes), memory_in(cache, self)
        vocab_size = self.config.text_config.vocab_size
        layout = check_inputs(input_ids, attention_mask, inputs_embeds, labels, memory, vocab_size)
        check_positions(position_ids, layout, memory)
        ends = ends_of(sleep_after, layout)

        sleeper = self._sleeper(cache)
        embeds: Any = layout.zeroed(inputs_embeds)
        x = sleeper.decoder.first_input(embeds) if input_ids is None else sleeper.decoder.embed(input_ids)
        warn_if_emulated(x)
        memory = memory if memory.counters else sleeper.empty(len(x), x.dtype)
        if use_cache is None:
            use_cache = cache is not None or self._caches_by_default()
        in_step = cache is None and not use_cache and is_sharded(self)
        self._advice.before_reading(self, memory, layout, policy, looks_at_weights=not in_step)
        read = layout
        if in_step:
            longest = lengths_in_step(max(layout.counts), x.device, policy.depends_on_data, ends is not None)
            read = layout.lengthened(longest)
            x = F.pad(x, (0, 0, 0, read.width - layout.width))

        asked = Asked.of(labels, layout, read, logits_to_keep, in_training=self.training)
        memory, reads = sleeper.read(memory, read.compact(x), read.counts, policy, asked.wanted, backprop_windows, ends)
        logits, loss = answer(
            asked, reads, sleeper.decoder, x, vocab_size, skip_head, self.gradient_checkpointing, token_loss
        )
        if loss is not None and asked.targets is not None and labels is not None:
            loss = mean_loss(loss, asked.targets, labels, num_items_in_batch)
        if self.training and torch.is_grad_enabled():
            loss, logits = reaching(self.between, loss, logits)

        if cache is None and use_cache:
            cache = SleepCache()
        if cache is not None:
            cache.hold(self, memory.with_columns(layout.start, layout.counts, layout.width))
        past = {CACHE: cache if use_cache else None}
        output: Any = CausalLMOutputWithPast(loss=loss, logits=logits, **past)
        if skip_head:
            output = BaseModelOutputWithPast(last_hidden_state=logits, **past)
        return output.to_tuple() if return_dict is False else output

    def _caches_by_default(self) -> bool:
        # Ranks that hold a part of the weights each read in step, which those with a cache of their own cannot.
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        return self.config.use_cache and not checkpointing and not is_sharded(self)

    def get_compiled_call(self, compile_config: Any = None) -> CompiledCall:
        """This model's call, whose decode steps run as one graph where the cache is a `StaticSleepCache`.

        generate takes it then, on a GPU, and on a CPU where it got a `compile_config` (a `transformers.CompileConfig`).
        """
        return CompiledCall.of(self, compile_config or self._default_compile_config())

    @takes_cache
    def sleep(self, cache: SleepCache, sleep_passes: int | PassPolicy | None = None) -> SleepCache:
        """Sleep now, on windows that are not full: in idle time, or at the end of a document.

        Args:
            cache: is moved on, in eval mode without a graph; rows that have read nothing since a sleep are left alone.
            sleep_passes: N, or a policy; by default the config's. Each window was already read once, so N runs N - 1
                passes.

        Returns:
            `cache`.

        Raises:
            ValueError: a cache that this model did not write, or an impossible N.
        """
        policy, memory = self._policy(sleep_passes), memory_in(cache, self)
        if not memory.counters:
            raise ValueError("cache has read nothing yet: there is nothing to sleep on. Call the model with it first")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training):
            memory = self._sleeper(cache).sleep(memory, range(len(memory.counters)), policy)
        cache.hold(self, memory)
        return cache


AutoConfig.register("sleep_lm", SleepLMConfig, exist_ok=True)
AutoModelForCausalLM.register(SleepLMConfig, SleepForCausalLM, exist_ok=True)
# Trainer's label smoothing shifts the labels of the classes that are named here; `register` names none.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[SleepLMConfig.model_type] = SleepForCausalLM.__name__
