"""torch.compile and a model that sleeps."""

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import logging

from ..compat import CACHE, CausalLMOutputWithPast
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


# With other keywords, or with these set to something, a call is for the model itself.
OF_A_STEP = {"input_ids", "attention_mask", CACHE, "use_cache", "logits_to_keep", "sleep_passes", "return_dict"}


def read_token(sleeper: Sleeper, buffers: Buffers) -> torch.Tensor:
    """`Sleeper.read_token`: what is compiled."""
    return sleeper.read_token(buffers)


class CompiledCall:
    """Calls a model; a token that no sleep comes before runs as one compiled graph, all else as it is.

    The graph is made once per number of rows, and stays: sleeps come between two runs of it. It holds for a
    `StaticSleepCache` and a call in which nothing needs a gradient. Any other call is the model's own, and does the
    same.

    Args:
        model: a `SleepForCausalLM`. It is not kept alive.
        config: of `torch.compile`, a `transformers.CompileConfig`.
    """

    def __init__(self, model: Any, config: Any):
        self.config, self._model = config, weakref.ref(model)
        # Sizes are fixed, which is the point: another number of rows is another graph.
        self._read_token = torch.compile(read_token, **config.to_dict() | {"dynamic": config.dynamic or False})
        self._sleeper: Sleeper | None = None
        self._settings: Any = None

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        model: Any = self._model()
        cache: Any = inputs.get(CACHE)
        if args or not self._is_step(model, cache, inputs):
            return model(*args, **inputs)
        sleeper = self._sleeper_of(model)
        check_cache(cache, model)
        check_settings(inputs.get("logits_to_keep", 0), None, False, None, None)
        model._policy(inputs.get("sleep_passes"))
        ids, vocab_size = inputs["input_ids"], model.config.text_config.vocab_size
        layout = check_inputs(ids, inputs.get("attention_mask"), None, None, cache.shell, vocab_size)
        if not cache.can_step(sleeper, layout.counts):
            return model(**inputs)
        step = functools.partial(self._read_token, sleeper)
        logits = cache.read_token(sleeper, step, ids, layout.counts)
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})

    @classmethod
    def of(cls, model: Any, config: Any) -> "CompiledCall":
        """That of `model`: the same one for an equal config, and its graphs with it."""
        last = model.__dict__.get("_sleep_compiled_call")
        if last is None or last.config != config:
            last = model.__dict__["_sleep_compiled_call"] = cls(model, copy.copy(config))
        return last

    def _is_step(self, model: Any, cache: Any, inputs: dict[str, Any]) -> bool:
        """Whether a call reads one more token of every row, and asks for logits alone."""
        ids = inputs.get("input_ids")
        return (
            isinstance(cache, StaticSleepCache)
            and not cache.is_empty
            and ids is not None
            and ids.dim() == 2
            and ids.shape[1] == 1
            and inputs.get("return_dict") is not False
            and inputs.get("use_cache") is not False
            and not (model.training or torch.is_grad_enabled())
            and all(name in OF_A_STEP or value is None for name, value in inputs.items())
        )

    def _sleeper_of(self, model: Any) -> Sleeper:
        """The algorithm; the same object while the settings are, or the graph's guards would look at a new one."""
        if self._sleeper is None or self._settings is not model.config.sleep:
            self._sleeper, self._settings = model._sleeper(), model.config.sleep
        require_masks(self._sleeper.decoder.attention_implementation)
        return self._sleeper
