"""SleepForCausalLM: a pretrained decoder LM that sleeps."""

import copy
import functools
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import CommitInfo
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.peft import maybe_load_adapters
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import CONFIG_NAME, cached_file, logging

from .cache import SleepCache
from .compat import CACHE, BaseModelOutputWithPast, CausalLMOutputWithPast, GenerationMixin, takes_cache
from .config import SleepConfig, SleepLMConfig, check_keywords, check_model_type
from .decoders import Decoder, decoder_for
from .dtypes import emulated_dtype_of
from .generation import RecurrentGenerationMixin
from .hub import (
    AUTO_MAP,
    TAGS,
    CardFacts,
    Repository,
    forget_folders,
    hub_id,
    is_untrained,
    write_model_card,
    write_remote_code,
)
from .layers import FastWeightBlock
from .layers.recurrence import GATES, keeping
from .offload import compute_device
from .packing import MARKS, refuse_packed
from .sleep import PassHook, Piece, Sleeper, SleepHook
from .state import fingerprint

logger = logging.get_logger(__name__)

# What from_pretrained takes to find a checkpoint, as opposed to what it takes to load it.
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")
# Of an only-sleep checkpoint's keywords, those for the base: how its weights are laid out and computed with.
BASE_KEYWORDS = (
    "attn_implementation",
    "experts_implementation",
    "quantization_config",
    "gguf_file",
    "device_map",
    "max_memory",
    "offload_folder",
    "offload_buffers",
    "distributed_config",
    "device_mesh",
    "tp_plan",
    "tp_size",
    "use_kernels",
    "kernel_config",
    "allow_all_kernels",
    "fusion_config",
)
# And those for base and new weights alike. All others are of the new weights' files: revision, subfolder, variant, …
SHARED_KEYWORDS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "token",
    "ignore_mismatched_sizes",
    "weights_only",
    "disable_mmap",
    "tqdm_class",
)
# Of save_pretrained's, those for push_to_hub.
PUSH_KEYWORDS = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
# What PEFT, accelerate and transformers ask a model to learn how its linear layers are stored.
QUANTISATION = {"is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"}
# Of what stock models take as further keywords, what no answer here depends on, and the values with which others say
# nothing.
UNUSED_KEYWORDS = ("cache_position", "token_type_ids")
SAYING_NOTHING = {"is_causal": (None, True), "output_router_logits": (None, False)}


def uncompiled(function: Callable) -> Callable:
    """Let torch.compile run `function` as it is, and say so once: how often layers run depends on what was read."""

    @functools.partial(torch.compiler.disable, reason="a model that sleeps is not compiled")
    def run(*args: Any, **kwargs: Any) -> Any:
        logger.warning_once("torch.compile leaves a model that sleeps as it is: it runs as it does without.")
        return function(*args, **kwargs)

    @functools.wraps(function)
    def choose(*args: Any, **kwargs: Any) -> Any:
        return (run if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return choose


@dataclass
class Layout:
    """Where the real tokens of a call's columns are.

    Args:
        start: first real column per row.
        counts: real tokens per row.
        width: columns of the call.
    """

    start: list[int]
    counts: list[int]
    width: int

    def mask(self) -> torch.Tensor:
        """`[B, width]`, whether a column holds a token."""
        column = torch.arange(self.width)
        start, counts = (torch.tensor(values).unsqueeze(1) for values in (self.start, self.counts))
        return (column >= start) & (column < start + counts)

    def compact(self, t: torch.Tensor) -> torch.Tensor:
        """`[B, width, ...]` with each row's real tokens moved to the front."""
        if not any(self.start):
            return t
        column = torch.arange(max(1, *self.counts), device=t.device)
        index = (column + torch.tensor(self.start, device=t.device).unsqueeze(1)).clamp(max=self.width - 1)
        return torch.take_along_dim(t, index.view(*index.shape, *(1,) * (t.dim() - 2)), dim=1)

    def lengthened(self, longest: int) -> "Layout":
        """With `longest` tokens in the row that has most of them: those behind its end count as real."""
        row = max(range(len(self.counts)), key=self.counts.__getitem__)
        counts = [longest if b == row else n for b, n in enumerate(self.counts)]
        return Layout(self.start, counts, max(self.width, self.start[row] + longest))


class Headless(nn.Module):
    """A sleeping model that stops before its head: it reads and sleeps as the model does.

    What `base_model` is, for those who apply the head themselves, as TRL's trainers do from within the model's
    forward. It calls the class's own forward: theirs has taken the place of the instance's, and hooks have run.

    Args:
        model: a `SleepForCausalLM`.
    """

    def __init__(self, model: "SleepForCausalLM"):
        super().__init__()
        self.model, self.config = model, model.config
        self._tp_plan, self._pp_plan = model._tp_plan, model._pp_plan

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        """As `SleepForCausalLM.forward` without labels: `last_hidden_state` `[B, T, C]` instead of logits."""
        return type(self.model).forward(self.model, *args, **kwargs, skip_head=True)


class SleepPreTrainedModel(PreTrainedModel):
    """What a sleeping model and its blocks alone share: how they are loaded and initialised."""

    config_class = SleepLMConfig
    _keep_in_fp32_modules_strict = list(GATES)
    _supports_sdpa = True
    _supports_flash_attn = True

    def make_blocks(self) -> nn.ModuleDict:
        """The config's blocks, by the decoder layer that they follow; their weights are anything."""
        sleep, text = self.config.sleep, self.config.text_config
        return nn.ModuleDict(
            {
                str(layer): FastWeightBlock(
                    sleep.block_kind,
                    text.hidden_size,
                    sleep.block_num_heads,
                    sleep.block_head_dim,
                    sleep.block_expand_v,
                    sleep.block_conv_size,
                    getattr(text, "rms_norm_eps", 1e-6),
                )
                for layer in sleep.block_layers
            }
        )

    @classmethod
    def is_custom_code(cls) -> bool:
        # All initialisation here leaves loaded weights alone. transformers doubts that of custom code, and then skips
        # every module without parameters of its own, as a block is.
        return False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # The base's experts are run by its own code, as the base was loaded to run them.
        return True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FastWeightBlock):
            with torch.no_grad():
                module.init_weights(getattr(self.config.text_config, "initializer_range", 0.02))


class SleepBlocks(SleepPreTrainedModel):
    """The fast-weight blocks alone, as an only-sleep checkpoint holds them.

    Args:
        config: of the sleeping model that they are a part of.
    """

    def __init__(self, config: SleepLMConfig):
        super().__init__(config)
        self.fast_weights = self.make_blocks()
        self.report: Any = None
        self.post_init()

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        model.report = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        return model.report

    def load_adapter(self, *_: Any, **__: Any) -> Any:
        # An adapter beside the weights is the whole model's: it is loaded there.
        return self.report


class SleepForCausalLM(SleepPreTrainedModel, RecurrentGenerationMixin):
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
        decoder_for(self.lm)
        self.fast_weights = self.make_blocks()
        self.card, self.model_tags = CardFacts(), list(TAGS)
        self.gradient_checkpointing = False
        self._pass_hooks: dict[int, PassHook] = OrderedDict()
        self._sleep_hooks: dict[int, SleepHook] = OrderedDict()
        self._may_be_untrained, self._is_fresh = True, lm is not None
        self._may_be_stuck = True
        if lm is None:
            self.post_init()

    @classmethod
    def from_base(cls, base: PreTrainedModel, sleep: SleepConfig | None = None) -> "SleepForCausalLM":
        """Retrofit a loaded base model: wrap it and give it fresh fast-weight blocks that add nothing yet.

        The blocks follow from the base's weights alone: whoever loads the same base as it was loaded here gets the
        same model. For others, as seeds of an experiment, draw them from torch's generator with
        `block.init_weights(std)` for every block of `model.fast_weights.values()`.

        Args:
            base: a causal LM of a known family, on any device, quantised or not. It is wrapped, not copied.
            sleep: how to sleep; defaults to `SleepConfig()`.

        Raises:
            ValueError: an unknown family, or settings that do not fit the base.
        """
        decoder = decoder_for(base)
        # A new config resets what its sub-configs were loaded with.
        attention, experts = base.config._attn_implementation, base.config._experts_implementation
        config = SleepLMConfig(
            text_config=base.config,
            sleep=sleep or SleepConfig(),
            base_model_name_or_path=base.config._name_or_path or None,
            base_fingerprint=fingerprint(base),
            dtype=base.dtype,
            use_cache=getattr(base.config, "use_cache", True),
        )
        config._attn_implementation, config._experts_implementation = attention, experts
        with torch.device("meta"):
            model = cls(config, lm=base)
        std = getattr(base.config, "initializer_range", 0.02)
        high = torch.promote_types(base.dtype, torch.float32)
        block: Any
        for layer, block in model.fast_weights.items():
            # The same base gets the same blocks, in every process and on any device, or no memory of a fresh retrofit
            # could be kept. In float64, since how float32 is drawn depends on the processor.
            seed = hashlib.sha256(f"{config.base_fingerprint}/{layer}".encode()).digest()
            block.to_empty(device="cpu").double()
            block.init_weights(std, torch.Generator("cpu").manual_seed(int.from_bytes(seed[:8])))
            for name, parameter in block.named_parameters():
                is_gate = name.rpartition(".")[2] in GATES
                parameter.data = parameter.data.float().to(high if is_gate else base.dtype)
            block.to(compute_device(decoder.layers[int(layer)]))
            for module in block.modules():
                module._is_hf_initialized = True
        for module in base.modules():
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

    def _apply(self, fn: Callable, recurse: bool = True) -> "SleepForCausalLM":
        # What loading in 16 bits keeps: the gates, a hybrid base's too, and what is computed and not loaded, as RoPE's
        # frequencies are.
        kept = [parameter for name, parameter in self.named_parameters() if name.rsplit(".", 1)[-1] in GATES]
        kept += [buffer for _, buffer in self.named_non_persistent_buffers()]
        return super()._apply(keeping(fn, kept), recurse)

    @property
    def decoder(self) -> Decoder:
        """How the base's layers are run."""
        return decoder_for(self.lm)

    @property
    def base_model(self) -> Headless:
        """This model without its head. Not the base's decoder, which would read without sleep."""
        return Headless(self)

    def _get_name(self) -> str:
        # Trainer's label smoothing knows a causal LM by it, and FSDP2 puts a class of its own before this one.
        return SleepForCausalLM.__name__

    def _sleeper(self) -> Sleeper:
        checkpointing = self.gradient_checkpointing and self.training
        hooks = tuple(self._pass_hooks.values())
        sleep_hooks = tuple(self._sleep_hooks.values())
        return Sleeper(self.decoder, self.fast_weights, self.config.sleep, checkpointing, hooks, sleep_hooks)

    def on_sleep(self, hook: SleepHook) -> RemovableHandle:
        """Watch the sleeps of every call: for a progress bar over a long text, or to know what they cost.

        Args:
            hook: `hook(event)` is called when a sleep is over, in `forward`, `generate` and `sleep` alike, once per row
                that slept, with a `SleepEvent`: `row`, `tokens` read so far, `seconds`, `sleep_passes`. What it raises
                ends the call, and leaves the caller's cache as it was.

        Returns:
            A handle whose `remove()` ends it; in a `with` statement it ends with the block.
        """
        handle = RemovableHandle(self._sleep_hooks)
        self._sleep_hooks[handle.id] = hook
        return handle

    def register_pass_hook(self, hook: PassHook) -> RemovableHandle:
        """Watch the passes of every sleep.

        Args:
            hook: `hook(number, states)` is called after each pass over a window that sleeps, the ordinary read being
                number 1, with the fast weights `[B, H, K, V]` that the pass left in each looped layer, a row per
                sequence that sleeps. They are part of the graph; they must not be changed. A hook on one of them, for
                its gradient, must not hold one: that is a cycle through the graph, which no collector sees.

        Returns:
            A handle whose `remove()` ends it.
        """
        handle = RemovableHandle(self._pass_hooks)
        self._pass_hooks[handle.id] = hook
        return handle

    def slot_devices(self) -> list[torch.device]:
        """Where each layer's cache lives, in running order."""
        sleeper = self._sleeper()
        return [sleeper.device_of(slot) for slot in sleeper.slots]

    def fast_slots(self) -> frozenset[int]:
        """Which layers, in running order, carry fast weights."""
        return self._sleeper().fast_slots

    def get_input_embeddings(self) -> nn.Module:
        return self.lm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.lm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm.set_output_embeddings(new_embeddings)

    def _set_gradient_checkpointing(self, enable: bool = True, **_: Any) -> None:
        # The base's own checkpointing drops its cache in training, and with it what was retained: a whole
        # (window, pass) is checkpointed here instead.
        self.gradient_checkpointing = enable

    # Forward.

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
        logits_to_keep: int = 0,
        sleep_passes: int | None = None,
        backprop_windows: int | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: torch.Tensor | None = None,
        skip_head: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | BaseModelOutputWithPast | tuple:
        """Read tokens; sleep whenever a window is full and another token comes.

        Args:
            input_ids: `[B, T]` token ids.
            attention_mask: `[B, T]`, or `[B, past + T]`, whose past must be what was read with. It is compared column
                by column, so the first is cheaper. 0 at pads, which may stand at either end.
            cache: the cache to go on from; is moved on, and left as it was when an error is raised.
            inputs_embeds: `[B, T, C]` instead of `input_ids`.
            labels: `[B, T]`, -100 where ignored; logits at a token predict the label of the next, in whatever window.
                Targets at pads are ignored.
            use_cache: return a cache; by default when one was passed, and where `config.use_cache` says so, as in stock
                models: not in training with gradient checkpointing, nor where weights are sharded over ranks.
            logits_to_keep: how many of the last columns need logits; 0 for all.
            sleep_passes: N for the sleeps of this call; by default the config's.
            backprop_windows: truncated backpropagation: a row's gradient is cut behind every so many of its sleeps in
                this call. By default it is whole, as in the paper.
            num_items_in_batch: what to divide the summed loss by, as Trainer counts it: the labels of all rows that
                share an optimizer step, but for their first column. Of those that nothing predicts, at a left-padded
                row's first token, the share is taken out that they have here. By default the number of targets.
            output_attentions: refused.
            output_hidden_states: refused.
            return_dict: `False` for a tuple.
            position_ids: `[B, T]` or `[1, T]`, counting up over a row's tokens; a model that sleeps numbers them
                itself, so this is only checked.
            skip_head: return a `BaseModelOutputWithPast` with `last_hidden_state` `[B, T or logits_to_keep, C]`, which
                the output embeddings turn into logits (where the base caps them, before its cap).
            kwargs: what stock models take and ignore (`token_type_ids`, `cache_position`), and what they take for
                packed samples, which is refused.

        Returns:
            `CausalLMOutputWithPast` with `logits` `[B, T or logits_to_keep, vocab]` (zeros at pads), `loss` and
            `cache`. In training with `labels`, `logits` is `None`, as they are made only where a target wants
            them; an explicit `logits_to_keep` asks for them all the same.

        Raises:
            ValueError: for input that cannot be read, before anything has changed.
            TypeError: for an unknown keyword.

        Source: Lee et al. 2026, Alg. 1.
        """
        self._check_whole()
        self._check_keywords(kwargs)
        passes = self._check_passes(sleep_passes)
        if output_attentions or output_hidden_states:
            raise ValueError(
                "output_attentions and output_hidden_states are not supported: a window's layers run several "
                "times, so there is no one answer. Run model.decoder's layers to look inside"
            )
        held = self._check_cache(cache)
        layout = self._check_inputs(input_ids, attention_mask, inputs_embeds, labels, held)
        self._check_positions(position_ids, layout, held)
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise ValueError(f"logits_to_keep={logits_to_keep!r}: it must be an integer, 0 (all columns) or more")
        if backprop_windows is not None and (type(backprop_windows) is not int or backprop_windows < 1):
            raise ValueError(
                f"backprop_windows={backprop_windows!r}: it must be an integer of at least 1, or None for all windows"
            )
        if skip_head and labels is not None:
            raise ValueError("skip_head=True with labels: a loss needs the head. Leave one of them out")
        sleeper = self._sleeper()
        embeds: Any = inputs_embeds if input_ids is None else sleeper.decoder.embed(input_ids)
        self._warn_if_emulated(embeds)
        if held.is_empty:
            held.start(self, embeds.shape[0], sleeper.start(embeds.shape[0], embeds), sleeper.fast_slots)
        if use_cache is None:
            use_cache = cache is not None or self._caches_by_default()
        in_step = cache is None and not use_cache and self._is_sharded()
        if not in_step:
            self._warn_if_untrained(held, layout, passes)
        self._warn_if_stuck(held, layout)

        targets = None if labels is None else _next_labels(labels, layout)
        keep = min(logits_to_keep or layout.width, layout.width)
        columns, read = layout.width, layout
        if in_step:
            # Ranks gather each other's weights, so all must run the same modules in the same order: as many windows,
            # every one of them to the end. What is read behind a row's end has no target, and nothing looks back at it.
            layout = layout.lengthened(_largest_of_ranks(max(layout.counts), embeds.device))
            embeds = F.pad(embeds, (0, 0, 0, layout.width - columns))
            targets = None if targets is None else F.pad(targets, (0, layout.width - columns), value=-100)
        lean = None
        if targets is not None and self.training and not logits_to_keep:
            lean = layout.compact(targets).cpu()
        # A loss needs all columns, whatever the caller wants to see of them.
        made = keep if targets is None and not in_step else layout.width
        wanted = None if in_step else _wanted(lean, layout, made)
        pieces = sleeper.read(held, layout.compact(embeds), layout.counts, passes, wanted, backprop_windows)
        logits = loss = None
        if lean is not None:
            loss = self._loss_of_pieces(pieces, lean, embeds)
        else:
            logits = self._logits_of_pieces(pieces, layout, made, embeds, skip_head)
            loss = None if targets is None else _summed_cross_entropy(logits, targets)
            logits = (logits[:, :columns] if in_step else logits)[:, -keep:]
        if loss is not None and targets is not None and labels is not None:
            count = (targets != -100).sum()
            if num_items_in_batch is not None:
                surplus = (labels[:, 1:] != -100).sum() - count
                count = _without_surplus(torch.as_tensor(num_items_in_batch).to(count.device), count, surplus)
            # Where there is nothing to predict the loss is 0, not 0 / 0.
            loss = loss / count.to(loss.device).clamp(min=1)

        held.count_columns(read.start, read.counts, columns)
        if cache is not None:
            cache.assign(held)
            held = cache
        past = {CACHE: held if use_cache else None}
        output: Any = CausalLMOutputWithPast(loss=loss, logits=logits, **past)
        if skip_head:
            output = BaseModelOutputWithPast(last_hidden_state=logits, **past)
        return output.to_tuple() if return_dict is False else output

    def _caches_by_default(self) -> bool:
        # Ranks that hold a part of the weights each read in step, which those with a cache of their own cannot.
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        return self.config.use_cache and not checkpointing and not self._is_sharded()

    def _is_sharded(self) -> bool:
        """Whether ranks hold a part of the weights each (FSDP2)."""
        return dist.is_initialized() and any(isinstance(module, FSDPModule) for module in self.modules())

    @takes_cache
    def sleep(self, cache: SleepCache, sleep_passes: int | None = None) -> SleepCache:
        """Sleep now, on windows that are not full: in idle time, or at the end of a document.

        Args:
            cache: is moved on; rows that have read nothing since their last sleep are left alone.
            sleep_passes: N; by default the config's. Each window was already read once, so this runs N - 1 passes.

        Returns:
            `cache`.

        Raises:
            ValueError: a cache that this model did not write, or an impossible N.
        """
        passes = self._check_passes(sleep_passes)
        held = self._check_cache(cache)
        if held.is_empty:
            raise ValueError("cache has read nothing yet: there is nothing to sleep on")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training):
            self._sleeper().consolidate(held, list(range(len(held.rows))), passes)
        cache.assign(held)
        return cache

    # Logits and loss.

    def _logits_of_pieces(
        self, pieces: Iterator[Piece], layout: Layout, keep: int, embeds: torch.Tensor, skip_head: bool = False
    ) -> torch.Tensor:
        """`[B, keep, vocab]` in the caller's columns, zeros at pads; with `skip_head` what the head takes."""
        head = self.decoder.head_input if skip_head else self.decoder.logits
        parts = [piece for piece in pieces if piece.hidden is not None]
        batch = len(layout.counts)
        first = layout.width - keep
        whole = all(len(p.rows) == batch and len(set(p.start)) == len(set(p.counts)) == 1 for p in parts)
        if parts and whole and not any(layout.start) and set(layout.counts) == {layout.width}:
            windows: Any = [p.hidden for p in parts]
            return head(torch.cat(windows, dim=1)[:, -keep:])
        # Out of place, so that an eval-mode loss still has its gradient.
        rows, columns, tokens = [], [], []
        for piece in parts:
            hidden: Any = piece.hidden
            for i, (b, start, count) in enumerate(zip(piece.rows, piece.start, piece.counts, strict=True)):
                low = min(count, max(0, first - start - layout.start[b]))
                column = torch.arange(low, count) + start + layout.start[b] - first
                rows.append(torch.full_like(column, b))
                columns.append(column)
                tokens.append(hidden[i, low:count])
        size = embeds.shape[-1] if skip_head else self.config.text_config.vocab_size
        if not tokens:
            return embeds.new_zeros(batch, keep, size)
        logits = head(torch.cat(tokens))
        index = (torch.cat(rows).to(logits.device), torch.cat(columns).to(logits.device))
        return logits.new_zeros(batch, keep, size).index_put(index, logits)

    def _loss_of_pieces(self, pieces: Iterator[Piece], targets: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy, window by window: logits are made only where there is a target, and not kept."""
        total: torch.Tensor | None = None
        for piece in pieces:
            if piece.hidden is None:
                continue
            window = torch.full(piece.hidden.shape[:2], -100)
            for i, (b, start, count) in enumerate(zip(piece.rows, piece.start, piece.counts, strict=True)):
                window[i, :count] = targets[b, start : start + count]
            row, column = (index.to(piece.hidden.device) for index in (window != -100).nonzero(as_tuple=True))
            arguments = piece.hidden[row, column], window[window != -100].to(piece.hidden.device)
            if not len(row):
                # Adds nothing, but gives the loss its graph: a rank without targets must run its backward too.
                arguments = piece.hidden[:1, 0], torch.full((1,), -100, device=piece.hidden.device)
            if self.gradient_checkpointing:
                part = checkpoint(self._cross_entropy, *arguments, use_reentrant=False)
            else:
                part = self._cross_entropy(*arguments)
            total = part if total is None else total + part
        return embeds.float().sum() * 0.0 if total is None else total  # all pads

    def _cross_entropy(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Summed over `hidden` `[n, C]` and `targets` `[n]`."""
        return _summed_cross_entropy(self.decoder.logits(hidden), targets)

    # Checks: all of them before anything changes.

    def _check_whole(self) -> None:
        first = next(self.parameters(), None)
        if first is None:
            raise ValueError(
                "nn.DataParallel, in which Trainer wraps a model on a machine with several GPUs, makes copies without "
                "parameters of their own: start one process per GPU, with torchrun or accelerate launch (DDP, FSDP2)"
            )
        if hasattr(first, "ds_id"):
            raise ValueError(
                "DeepSpeed ZeRO-3 gathers a module's weights where all ranks call it, and ranks whose rows have other "
                "numbers of windows would wait for each other for ever. Use FSDP2 (recipes/accelerate/fsdp2.yaml), "
                "where they agree on the number, or ZeRO-2"
            )

    def _check_keywords(self, kwargs: dict[str, Any]) -> None:
        for name, value in kwargs.items():
            if name in SAYING_NOTHING:
                if value not in SAYING_NOTHING[name]:
                    raise ValueError(f"{name}={value!r}: a model that sleeps has no such mode, leave it out")
            elif name not in (*UNUSED_KEYWORDS, *MARKS):
                raise TypeError(f"{type(self).__name__}.forward() got an unexpected keyword argument {name!r}")
        refuse_packed(kwargs)

    @staticmethod
    def _check_positions(position_ids: torch.Tensor | None, layout: Layout, cache: SleepCache) -> None:
        """Whether positions only say that a row's tokens come one after the other."""
        if position_ids is None:
            return
        batch = len(layout.counts)
        if position_ids.shape[-1] != layout.width or position_ids.shape[-2:-1] not in ((1,), (batch,)):
            raise ValueError(
                f"position_ids have shape {tuple(position_ids.shape)}: it must be {(batch, layout.width)} or "
                f"{(1, layout.width)}"
            )
        refuse_packed({"position_ids": position_ids}, layout.mask())
        positions = position_ids.expand(batch, -1) if position_ids.dim() == 2 else position_ids[0].expand(batch, -1)
        first = positions.detach().cpu()[range(batch), layout.start].tolist()
        for b, (position, count, row) in enumerate(zip(first, layout.counts, cache.rows, strict=False)):
            if count and position < row.seen:
                raise ValueError(
                    f"position_ids of row {b} begin again at {position} after {row.seen} tokens that cache has read, "
                    "as for the next of several packed samples: one would remember the other. Give each sample a cache "
                    "of its own"
                )

    def _check_passes(self, sleep_passes: int | None) -> int:
        passes = self.config.sleep.sleep_passes if sleep_passes is None else sleep_passes
        if not isinstance(passes, int) or isinstance(passes, bool) or passes < 1:
            raise ValueError(
                f"sleep_passes={sleep_passes!r}: it must be an integer of at least 1 (1 is the plain hybrid)"
            )
        return passes

    def _check_cache(self, cache: SleepCache | None) -> SleepCache:
        """A private copy of the cache to work on, so that an error leaves the caller's as it was."""
        if cache is None:
            return SleepCache()
        if not isinstance(cache, SleepCache):
            raise ValueError(
                f"cache is a {type(cache).__name__}: a sleeping model needs a hf_sleep.SleepCache "
                "(make an empty one, "
                "or let generate make it)"
            )
        if not cache.is_empty and not cache.belongs_to(self):
            raise ValueError(
                "cache was written by another model, whose fast weights mean nothing to this one: "
                "start with an empty "
                "SleepCache"
            )
        return cache.fork()

    def _check_inputs(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        labels: torch.Tensor | None,
        cache: SleepCache,
    ) -> Layout:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        given: Any = inputs_embeds[..., 0] if inputs_embeds is not None else input_ids
        if given.dim() != 2 or not given.numel():
            raise ValueError(
                f"the input has shape {tuple(given.shape)}: it must be [batch, tokens], with at least one "
                "token that the cache "
                "has not read (generate with a cache takes the whole conversation)"
            )
        if inputs_embeds is None:
            vocab = self.config.text_config.vocab_size
            low, high = torch.stack(torch.aminmax(given)).tolist()
            if low < 0 or high >= vocab:
                raise ValueError(f"input_ids hold {low if low < 0 else high}: ids must be from 0 to {vocab - 1}")
        batch, width = given.shape
        if not cache.is_empty and len(cache.rows) != batch:
            raise ValueError(
                f"cache holds {len(cache.rows)} sequences, the input {batch}: use "
                "cache.batch_select_indices or "
                "batch_repeat_interleave to match them"
            )
        if labels is not None and labels.shape != given.shape:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, the input {tuple(given.shape)}: they must be the "
                "same (the shift by "
                "one token is done inside)"
            )
        if attention_mask is None:
            return Layout([0] * batch, [width] * batch, width)
        if attention_mask.dim() != 2 or attention_mask.shape not in ((batch, width), (batch, cache.columns + width)):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: it must be {(batch, width)}"
                + (f" or, with the past, {(batch, cache.columns + width)}" if cache.columns else "")
            )
        if attention_mask.shape[1] > width:
            cache.check_past(attention_mask[:, :-width])
        return _layout_of_mask(attention_mask[:, -width:])

    def _warn_if_untrained(self, cache: SleepCache, layout: Layout, passes: int) -> None:
        """Once, when an untrained model is about to sleep."""
        if self.training:
            self._is_fresh = False
        if not self._may_be_untrained or self.training:
            return
        if not self._will_sleep(cache, layout):
            return
        self._may_be_untrained = False
        if self.fast_weights and not all(block.is_untrained for block in self.fast_weights.values()):
            return
        if self.fast_weights:
            what = (
                "fast-weight blocks that were never trained: they add nothing, so what leaves the window is forgotten."
            )
        elif self._is_fresh:
            what = "a sleep that it was never trained for: what leaves the window is mostly forgotten."
        else:
            return
        advice = " Train it through sleep first; until then, sleep only bounds memory."
        if self.config.sleep.eviction == "sliding" and passes > 1:
            advice += " Until then slide with sleep_passes=1, too: KV of a second pass is noise to it."
        logger.warning_once(f"This model was given {what}{advice}")

    def _warn_if_stuck(self, cache: SleepCache, layout: Layout) -> None:
        """Once, when training is about to sleep with blocks whose output projection is zero and stays so."""
        if not self._may_be_stuck or not self.training or not torch.is_grad_enabled():
            return
        if not self._will_sleep(cache, layout):
            return
        self._may_be_stuck = False
        outputs: dict[str, list[torch.Tensor]] = {}
        for name, parameter in self.fast_weights.named_parameters():
            if ".o_proj." in name:  # an adapter's, too
                outputs.setdefault(name.partition(".")[0], []).append(parameter)
        stuck = [block for block, ps in outputs.items() if not any(p.requires_grad or not _is_zero(p) for p in ps)]
        if stuck and any(parameter.requires_grad for parameter in self.parameters()):
            logger.warning_once(
                f"The fast-weight blocks {', '.join(stuck)} cannot learn: their output projections are zero and "
                "frozen, so they add nothing, and no gradient passes them. Train the blocks in full: with PEFT by "
                "hf_sleep.sleep_lora_config(model), else by requires_grad_(True) on model.fast_weights."
            )

    def _will_sleep(self, cache: SleepCache, layout: Layout) -> bool:
        size = self.config.sleep.window_size
        return any(row.fill + n > size for row, n in zip(cache.rows, layout.counts, strict=True))

    def _warn_if_emulated(self, embeds: torch.Tensor) -> None:
        """Once, when products are about to be computed in a dtype that the CPU has not."""
        if (dtype := emulated_dtype_of(embeds)) is None:
            return
        advice = 'call model.float(), or load it with dtype="float32"'
        if dtype != embeds.dtype:
            advice = "leave autocast out (bf16=False in TrainingArguments)"
        logger.warning_once(
            f"This model computes in {str(dtype).removeprefix('torch.')}, for which this CPU has no instructions: many "
            f"times slower than in float32. For speed {advice}; hf_sleep.default_dtype() knows a machine's dtype."
        )

    # Generation.

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} cannot hold fast weights: "
                "leave it unset, a "
                "SleepCache is made and is bounded anyway"
            )
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(
                "attention_mask ends with pads, and generate goes on from the last column: pad prompts on the left "
                "(tokenizer.padding_side = 'left')"
            )
        # Where the generation config has such an entry, generate has put the keyword there.
        passes = model_kwargs.setdefault("sleep_passes", getattr(generation_config, "sleep_passes", None))
        self._check_passes(passes)
        if (given := model_kwargs.get(CACHE)) is not None:
            if generation_config.use_cache is False:
                raise ValueError("use_cache=False and a cache contradict each other: leave one of them out")
            # It outlives the call, so a stop that is noticed a step late must not be taken back from it: it cannot be.
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = SleepCache()

    def _prefill(
        self, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict, *args: Any, **kw: Any
    ) -> Any:
        """Check a conversation against what its cache has read, before anything of it is read."""
        embeds, mask, cache = (model_kwargs.get(name) for name in ("inputs_embeds", "attention_mask", CACHE))
        width = (input_ids if embeds is None else embeds).shape[1]
        held = self._check_cache(cache)
        if not held.is_empty:
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
                    f"attention_mask=torch.ones({len(held.rows)}, {held.columns + width}, dtype=torch.long)"
                )
            held.check_past(None if mask is None else mask[:, : held.columns])
        if (positions := model_kwargs.pop("position_ids", None)) is not None:
            refuse_packed({"position_ids": positions}, mask)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kw)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if (mask := inputs.get("attention_mask")) is not None:
            # What it says of the past was checked before generate began.
            given = inputs["inputs_embeds"] if inputs["input_ids"] is None else inputs["input_ids"]
            inputs["attention_mask"] = mask[:, -given.shape[1] :]
        return inputs

    # Saving and loading.

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        only_sleep: bool = False,
        push_to_hub: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a checkpoint with its model card, which a person's README.md takes the place of.

        Args:
            save_directory: a folder, made where missing.
            only_sleep: write the fast-weight blocks alone; the base is loaded again from where it came from.
            push_to_hub: push it as well, with `push_to_hub`'s arguments; `repo_id` is the folder's name by default.
            state_dict: the weights, where they are not all here (sharded ones that were gathered).
            kwargs: as in `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: where what would be written could not be loaded again.
        """
        if push_to_hub:
            hub = {key: kwargs.pop(key) for key in PUSH_KEYWORDS if key in kwargs}
            repo_id = hub.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, only_sleep=only_sleep, state_dict=state_dict, **hub, **kwargs)
        self._check_loads_again(only_sleep, state_dict)
        self._save(save_directory, Path(save_directory).resolve().name, only_sleep, state_dict, **kwargs)

    def _check_loads_again(self, only_sleep: bool, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Whether a checkpoint would be all that this model is."""
        if state_dict is None and self._is_sharded():
            raise ValueError(
                "the model's weights are sharded over ranks (FSDP): save with trainer.save_model() on all ranks, or "
                "pass the gathered ones as state_dict"
            )
        if getattr(self, "peft_config", None) is not None and not self._hf_peft_config_loaded:
            raise ValueError(
                "the model carries PEFT adapters: call save_pretrained of the PeftModel for the adapter, or save what "
                "its merge_and_unload() returns"
            )
        if not only_sleep:
            if getattr(self.lm, "hf_quantizer", None) is not None:
                raise ValueError(
                    "the base is quantised, and a quantised base cannot be written inside a sleep checkpoint: use "
                    "save_pretrained(..., only_sleep=True)"
                )
            return
        if not self.config.base_model_name_or_path:
            raise ValueError(
                "only_sleep=True needs to know where the base comes from, and this one was built in memory: set "
                "config.base_model_name_or_path, or save everything"
            )
        if self.config.base_fingerprint != fingerprint(self.lm):
            raise ValueError(
                "only_sleep=True would lose what the base learned: its weights are no longer those it was loaded with. "
                "Save everything"
            )
        if not self.fast_weights:
            raise ValueError(
                "only_sleep=True: this model has no injected blocks, its fast weights are the base's own layers"
            )

    def _save(
        self,
        folder: str | os.PathLike,
        name: str,
        only_sleep: bool,
        state_dict: dict[str, torch.Tensor] | None,
        card: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write weights, config, card and the file that points to this package."""
        if self._hf_peft_config_loaded:
            # Of adapters that transformers added, it writes the adapter alone.
            super().save_pretrained(folder, state_dict=state_dict, **kwargs)
            return
        if only_sleep:
            state_dict = {k: v for k, v in (state_dict or self.state_dict()).items() if k.startswith("fast_weights.")}
        untrained = is_untrained(
            self.fast_weights.state_dict(prefix="fast_weights.") if state_dict is None else state_dict
        )
        if getattr(self.generation_config, "sleep_passes", None) is not None:
            # Of a generation config that was made of a model's config, loading drops what transformers does not know.
            self.generation_config._from_model_config = False
        # trust_remote_code marks the class, and then its file would be copied: the code stays in the package.
        self.config._auto_class = None
        self.config.auto_map, self.config.only_sleep = dict(AUTO_MAP), only_sleep
        try:
            super().save_pretrained(folder, state_dict=state_dict, **kwargs)
            if kwargs.get("is_main_process", True):
                write_remote_code(folder)
                write_model_card(self, folder, name, untrained=untrained, **(card or {}))
        finally:
            self.config.only_sleep = False

    def push_to_hub(
        self,
        repo_id: str,
        *,
        only_sleep: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: list[str] | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """Write a checkpoint to the Hub, with a model card unless a person wrote the one that is there.

        Args:
            repo_id: `"name"` or `"owner/name"`; made where there is none.
            only_sleep: as in `save_pretrained`.
            commit_message: of the commit.
            commit_description: of the commit.
            private: whether a new repository is private.
            token: for the Hub; by default the one that is logged in.
            revision: branch to push to, made where there is none.
            create_pr: open a pull request instead.
            tags: for the card, besides its own.
            state_dict: as in `save_pretrained`.
            kwargs: as in `save_pretrained` (max_shard_size, …).

        Raises:
            ValueError: where what would be written could not be loaded again, by others either.
        """
        self._check_loads_again(only_sleep, state_dict)
        base = self.config.base_model_name_or_path
        if only_sleep and hub_id(base) is None:
            raise ValueError(
                f"only_sleep=True would send those who load {repo_id} to {base!r}, a folder of this machine: set "
                "config.base_model_name_or_path to the base's id on the Hub, or push everything"
            )
        hub = Repository(repo_id, private, token, revision, create_pr)
        card = {"tags": tags or (), "download": True, "token": token}
        with TemporaryDirectory() as folder:
            self._save(folder, hub.repo_id, only_sleep, state_dict, card, **kwargs)
            forget_folders(folder)
            return hub.push(folder, commit_message, commit_description)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        sleep: SleepConfig | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a sleep checkpoint, from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: what `save_pretrained` or `push_to_hub` wrote, or an adapter for it.
            config: instead of the checkpoint's own.
            sleep: settings to change, as in `AutoModelForSleepLM.from_pretrained`.
            kwargs: as in `PreTrainedModel.from_pretrained`, fields of the config among them; those of the base's are
                set as `text_config={...}`. Of an only-sleep checkpoint, those that say how weights are laid out and
                computed with (dtype, device_map, quantization_config, attn_implementation, …) go to the base, and its
                blocks follow the layers that they stand after; those that say where a checkpoint is (revision,
                subfolder, variant, …) are for the new weights.

        Raises:
            ValueError: a checkpoint of another kind, as of a base that was not retrofitted.
            TypeError: a keyword that nothing takes.
        """
        name = pretrained_model_name_or_path
        hub = {key: kwargs[key] for key in HUB_KEYWORDS if kwargs.get(key) is not None}
        adapter, name, adapter_kwargs = maybe_load_adapters(name, hub, **(kwargs.pop("adapter_kwargs", None) or {}))
        if adapter is not None:
            adapter_kwargs["_adapter_model_path"] = adapter
        config, kwargs = _config_of(name, config, hub, kwargs)
        if sleep is not None:
            config.sleep = config.sleep.changed(sleep).resolve(config.text_config)
        if not config.only_sleep:
            return super().from_pretrained(name, *args, config=config, adapter_kwargs=adapter_kwargs, **kwargs)
        return cls._from_blocks(name, *args, config=config, adapter_kwargs=adapter_kwargs, **kwargs)

    @classmethod
    def _from_blocks(
        cls,
        name: Any,
        *args: Any,
        config: SleepLMConfig,
        adapter_kwargs: dict[str, Any],
        adapter_name: str = "default",
        generation_config: Any = None,
        output_loading_info: bool = False,
        trust_remote_code: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load an only-sleep checkpoint: the base from where it came, then the blocks on it."""
        base, base_report = _base_of(config, kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key not in (*BASE_KEYWORDS, "dtype", "torch_dtype")}
        adapter = adapter_kwargs.pop("_adapter_model_path", None)
        blocks, report = SleepBlocks.from_pretrained(
            name, *args, config=config, dtype=base.dtype, output_loading_info=True, **kwargs
        )
        missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
        if missing and unexpected:
            raise ValueError(
                f"{name} does not hold this model's fast weights: missing {missing[:3]}, unexpected {unexpected[:3]}"
            )
        model = cls.from_base(base, config.sleep)
        # What is missing stays as a fresh retrofit has it.
        fresh = {*missing, *(key for key, *_ in report["mismatched_keys"])}
        loaded = {key: weight for key, weight in blocks.state_dict().items() if key not in fresh}
        model.load_state_dict(loaded, strict=False)

        made = model.config
        if config.base_fingerprint not in (None, made.base_fingerprint):
            logger.warning(
                f"The base loaded from {config.base_model_name_or_path} has other weights than the one these "
                "fast weights "
                "were made with (another revision or quantisation?): what they remember may not fit it."
            )
        attention, experts = made._attn_implementation, made._experts_implementation
        for field in ("text_config", "dtype", "base_fingerprint", "only_sleep"):
            setattr(config, field, getattr(made, field))
        config._attn_implementation, config._experts_implementation = attention, experts
        model.config = config
        if name is not None:
            model.name_or_path = config.name_or_path = str(name)
        hub = {key: kwargs[key] for key in HUB_KEYWORDS if kwargs.get(key) is not None}
        default = {"revision": "main", "subfolder": "", "force_download": False, "local_files_only": False}
        download: dict[str, Any] = dict.fromkeys(HUB_KEYWORDS) | default | hub
        download |= {"trust_remote_code": trust_remote_code}
        model.adjust_generation_fn(generation_config, False, None, name, **download)
        model.eval()
        info = joined_reports(base_report, report)
        if adapter is not None:
            if adapter != name:
                hub.pop("revision", None)
            adapted = model.load_adapter(
                adapter, adapter_name=adapter_name, adapter_kwargs=hub | adapter_kwargs, dtype=model.dtype
            )
            info = adapted.to_dict()
        return (model, info) if output_loading_info else model


def _largest_of_ranks(number: int, device: torch.device) -> int:
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def _is_zero(parameter: torch.Tensor) -> bool:
    """Whether it is known to be; of a sharded one, this rank's part, as not all ranks may ask."""
    here = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return not here.is_meta and here.numel() > 0 and not bool(here.any())


def _without_surplus(given: torch.Tensor, count: torch.Tensor, surplus: torch.Tensor) -> torch.Tensor:
    """How many targets a step has, of which Trainer says that it has `given`.

    Args:
        given: labels of the whole step, with those that nothing predicts.
        count: targets of this call.
        surplus: labels of this call that Trainer counted and nothing predicts.
    """
    if not count or not surplus:
        return given
    if bool((given == count + surplus).all()):
        return count
    logger.warning_once(
        "num_items_in_batch counts labels that nothing predicts, those of the first token of rows that are padded on "
        "the left, and how many there are in the step's other batches cannot be known here: their share is taken for "
        "this one's, and where it differs the loss is a little off. To be exact pad on the right "
        "(tokenizer.padding_side = 'right'), or use hf_sleep.training.SleepCollator or SleepTrainer"
    )
    return given * (count / (count + surplus))


def _summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of logits `[..., vocab]`, in fp32 at least; targets of -100 do not count."""
    high = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(high.flatten(0, -2), targets.to(logits.device).flatten(), ignore_index=-100, reduction="sum")


def _layout_of_mask(mask: torch.Tensor) -> Layout:
    """Pads may stand at either end of a row; a hole between real tokens is refused."""
    real = mask.detach().to("cpu") != 0
    batch, width = real.shape
    if bool(real.all()):
        return Layout([0] * batch, [width] * batch, width)
    counts = real.sum(1)
    start = torch.where(counts > 0, real.int().argmax(1), 0)
    last = width - real.flip(1).int().argmax(1)
    if bool(holes := ((counts > 0) & (last - start != counts)).nonzero().flatten().tolist()):
        raise ValueError(
            f"attention_mask has zeros between ones in row {holes[0]}: pads may stand at the ends only. Move "
            "them there, or "
            "pass the parts one after the other with cache"
        )
    return Layout(start.tolist(), counts.tolist(), width)


def _next_labels(labels: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Per column the label of the next one, -100 where that is a pad or beyond the end. `[B, T]`."""
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    if any(layout.start) or min(layout.counts) < layout.width:
        column = torch.arange(layout.width, device=labels.device)
        start = torch.tensor(layout.start, device=labels.device).unsqueeze(1)
        end = start + torch.tensor(layout.counts, device=labels.device).unsqueeze(1)
        targets = targets.masked_fill((column < start) | (column + 1 >= end), -100)
    return targets


def _wanted(targets: torch.Tensor | None, layout: Layout, keep: int) -> list[list[bool]] | None:
    """Per row and real token, whether its logits are needed; `None` for all.

    Args:
        targets: left-aligned `[B, T]`: logits are needed only where there is one (or somewhere, for a graph).
        keep: without targets, how many of the last columns need logits.
    """
    if targets is not None:
        wanted = (targets != -100).tolist()
        if not any(map(any, wanted)):
            row = max(range(len(wanted)), key=layout.counts.__getitem__)
            wanted[row][max(0, layout.counts[row] - 1)] = True
        return wanted
    if keep >= layout.width:
        return None
    first = layout.width - keep
    return [
        [start + j >= first for j in range(count)] for start, count in zip(layout.start, layout.counts, strict=True)
    ]


def load_base(source: Any, kwargs: dict) -> tuple[PreTrainedModel, dict | None]:
    """A base model, and the loading report where `output_loading_info` asks for it."""
    base = AutoModelForCausalLM.from_pretrained(source, **kwargs)
    return base if isinstance(base, tuple) else (base, None)


def _config_of(
    name: Any, given: PreTrainedConfig | str | os.PathLike | None, hub: dict, kwargs: dict
) -> tuple[SleepLMConfig, dict]:
    """A sleep checkpoint's config, ours to change, with the fields that `kwargs` name; and the other `kwargs`."""
    if isinstance(given, PreTrainedConfig):
        file = None
        if name is not None:
            file = cached_file(name, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub)
        if file is not None:
            check_model_type(json.loads(Path(file).read_text(encoding="utf-8")).get("model_type"), name)
        check_model_type(given.model_type, f"config={type(given).__name__}(...)")
        config: Any = copy.deepcopy(given)
    else:
        defaults = SleepLMConfig()
        names = [key for key in kwargs if key not in ("dtype", "torch_dtype") and hasattr(defaults, key)]
        fields = {key: kwargs.pop(key) for key in names}
        config = SleepLMConfig.from_pretrained(name if given is None else given, **hub, **fields)
    check_keywords(kwargs, config.text_config)
    for key in kwargs:
        if key not in ("dtype", "torch_dtype") and hasattr(config.text_config, key):
            raise TypeError(f"{key} is a setting of the base: pass text_config={{{key!r}: {kwargs[key]!r}}}")
    return config, kwargs


def _base_of(config: SleepLMConfig, kwargs: dict) -> tuple[PreTrainedModel, dict]:
    """The base of an only-sleep checkpoint, with the settings that it had when the checkpoint was written."""
    source = config.base_model_name_or_path
    if source is None:
        raise ValueError(
            "the checkpoint holds fast weights alone, and its config does not say of which base: pass "
            "base_model_name_or_path=..."
        )
    asked = {key: kwargs[key] for key in (*BASE_KEYWORDS, *SHARED_KEYWORDS) if kwargs.get(key) is not None}
    if kwargs.get("use_safetensors"):
        asked["use_safetensors"] = True
    if isinstance(asked.get("device_map"), dict):
        asked["device_map"] = _map_of_base(asked["device_map"])
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    asked["dtype"] = dtype if dtype not in (None, "auto") else config.dtype or "auto"
    lookup = {key: asked[key] for key in (*HUB_KEYWORDS, "gguf_file") if key in asked}
    own = AutoConfig.from_pretrained(source, **lookup)
    _check_same_base(config.text_config, own.get_text_config())
    text = copy.deepcopy(config.text_config)
    # Whether its files are quantised is for them to say.
    if getattr(own, "quantization_config", None) is not None:
        text.quantization_config = own.quantization_config
    elif hasattr(text, "quantization_config"):
        del text.quantization_config
    return AutoModelForCausalLM.from_pretrained(source, config=text, output_loading_info=True, **asked)


def _map_of_base(device_map: dict[str, Any]) -> dict[str, Any]:
    """The base's part of a device map that names modules as a whole checkpoint does; the base's own names are left."""
    return {
        name if not f"{name}.".startswith("lm.") else name.removeprefix("lm").removeprefix("."): device
        for name, device in device_map.items()
        if not f"{name}.".startswith("fast_weights.")
    }


def joined_reports(base: dict, blocks: dict) -> dict:
    """One loading report of a base's and its blocks', in the names of the whole model."""
    joined: dict[str, set] = {key: {f"lm.{name}" for name in base[key]} for key in ("missing_keys", "unexpected_keys")}
    joined["mismatched_keys"] = {(f"lm.{name}", *shapes) for name, *shapes in base["mismatched_keys"]}
    joined = {key: names | blocks.get(key, set()) for key, names in joined.items()}
    return {**joined, "error_msgs": [*base["error_msgs"], *blocks.get("error_msgs", ())]}


def _check_same_base(saved: PreTrainedConfig, loaded: PreTrainedConfig) -> None:
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        if getattr(saved, key, None) != getattr(loaded, key, None):
            raise ValueError(
                f"the base has {key}={getattr(loaded, key, None)!r}, the fast weights were made for "
                f"{getattr(saved, key, None)!r}: base_model_name_or_path points to another model"
            )


AutoConfig.register("sleep_lm", SleepLMConfig, exist_ok=True)
AutoModelForCausalLM.register(SleepLMConfig, SleepForCausalLM, exist_ok=True)
# Trainer's label smoothing shifts the labels of the classes that are named here; `register` names none.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[SleepLMConfig.model_type] = SleepForCausalLM.__name__
