"""torch.compile and a model that sleeps."""

import copy
import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import logging

from ..compat import CACHE, CausalLMOutputWithPast, takes_cache
from ..engine import Buffers, require_masks
from ..sleep import Sleeper
from ..static_cache import StaticSleepCache
from .inputs import check_cache, check_inputs, check_settings

logger = logging.get_logger(__name__)


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


def sealed(function: Callable) -> Callable:
    """Let nobody look below the decorators of `function`; its signature stays.

    accelerate's `unwrap_model(keep_fp32_wrapper=False)` follows `__wrapped__` to the end, and leaves a model with what
    it finds there.
    """
    outer: Any = function
    outer.__signature__ = inspect.signature(function)
    del outer.__wrapped__
    return function


OF_A_STEP = {"input_ids", "attention_mask", "use_cache", "logits_to_keep", "sleep_passes", "return_dict"}
"""Keywords of a step. A call with others, set to something, is for the model itself."""

_calls: "weakref.WeakKeyDictionary[Any, CompiledCall]" = weakref.WeakKeyDictionary()


def read_token(sleeper: Sleeper, buffers: Buffers) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`Sleeper.read_token`: what is compiled."""
    return sleeper.read_token(buffers)


def why_not(model: Any) -> str | None:
    """What keeps a model from being compiled, where something does."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "accelerate moves this model's weights or inputs between devices"
    quantizer = model.quantizer
    if quantizer is not None and not quantizer.is_compileable:
        return f"{type(quantizer).__name__} says that what it quantises cannot be"
    return None


class CompiledCall:
    """Calls a model; a token that no sleep comes before runs as one compiled graph, all else as it is.

    The graph is made once per number of rows, and stays: sleeps come between two runs of it. torch keeps 8 graphs, and
    beyond them runs without (with `fullgraph`, it raises). That is for a `StaticSleepCache`, where nothing needs a
    gradient. Any other call is the model's own, and does the same.

    Args:
        model: a `SleepForCausalLM`. The object is not kept alive; its modules are while this call is.
        config: of `torch.compile`, a `transformers.CompileConfig`.
    """

    def __init__(self, model: Any, config: Any):
        self.config, self._model = config, weakref.ref(model)
        self._sleeper: Sleeper | None = None
        self._made_of: tuple[Any, ...] = ()
        self._never = why_not(model)
        if self._never:
            logger.warning_once(f"Nothing is compiled: {self._never}.")
        # Sizes are fixed, which is the point: another number of rows is another graph. torch counts graphs per code
        # object, and those of two models are not one's.
        own = types.FunctionType(read_token.__code__.replace(), read_token.__globals__)
        self._read_token = torch.compile(own, **config.to_dict() | {"dynamic": config.dynamic or False})

    @takes_cache
    def __call__(self, *args: Any, cache: Any = None, **inputs: Any) -> Any:
        model: Any = self._model()
        if model is None:
            raise ReferenceError("the model of this compiled call is gone: keep it, and call get_compiled_call again")
        if args or not self._is_step(model, cache, inputs):
            return model(*args, cache=cache, **inputs)
        check_cache(cache, model)
        check_settings(inputs.get("logits_to_keep", 0), None, False, None, None)
        model._policy(inputs.get("sleep_passes"))
        ids, vocab_size = inputs["input_ids"], model.config.text_config.vocab_size
        layout = check_inputs(ids, inputs.get("attention_mask"), None, None, cache.shell, vocab_size)
        sleeper = self._sleeper_of(model)
        if not cache.can_step(sleeper, layout.counts):
            return model(cache=cache, **inputs)
        logits = cache.read_token(model, sleeper, functools.partial(self._read_token, sleeper), ids, layout.counts)
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})

    @classmethod
    def of(cls, model: Any, config: Any) -> "CompiledCall":
        """That of `model`: the same one for an equal config, and its graphs with it."""
        last = _calls.get(model)
        if last is None or last.config != config:
            last = _calls[model] = cls(model, copy.copy(config))
        return last

    def _sleeper_of(self, model: Any) -> Sleeper:
        """The model's algorithm; made again where its settings, or a module that it holds, are others now."""
        made_of = (model.config.sleep, model.lm, model.between, *model.fast_weights.values())
        same = len(made_of) == len(self._made_of) and all(a is b for a, b in zip(made_of, self._made_of, strict=True))
        if self._sleeper is None or not same:
            self._sleeper, self._made_of = model._sleeper(), made_of
        require_masks(self._sleeper.decoder.attention_implementation)
        return self._sleeper

    def _is_step(self, model: Any, cache: Any, inputs: dict[str, Any]) -> bool:
        """Whether a call reads one more token of every row, and asks for logits alone."""
        ids = inputs.get("input_ids")
        return (
            isinstance(cache, StaticSleepCache)
            and not (cache.is_empty or self._never)
            and ids is not None
            and ids.dim() == 2
            and ids.shape[1] == 1
            and not isinstance(inputs.get("logits_to_keep"), torch.Tensor)
            and inputs.get("return_dict") is not False
            and inputs.get("use_cache") is not False
            and not (model.training or torch.is_grad_enabled())
            and all(name in OF_A_STEP or value is None for name, value in inputs.items())
        )
