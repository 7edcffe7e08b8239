"""Differences between the supported releases of transformers, and what it has under a private name alone.

Nothing else in the package asks for a version.

Each entry says from which release on it can go: once that is the oldest one supported, its branch is deleted.
"""

import functools
from collections.abc import Callable
from typing import Any

import transformers
from packaging.version import Version
from transformers import modeling_outputs
from transformers.utils import ModelOutput, cached_file
from transformers.utils.deprecation import deprecate_kwarg

TRANSFORMERS = Version(transformers.__version__)

# With 5.24: it renamed `past_key_values` to `cache` in generate, in every forward and in outputs. Before, the old name
# is the only one that transformers passes and reads.
_RENAMED = Version("5.24.0.dev0") <= TRANSFORMERS

CACHE = "cache" if _RENAMED else "past_key_values"
"""The name under which transformers' own modules take their cache, and under which an output is built with one."""

# With 5.23, which renamed the training argument and the model's methods; of the old names it warns.
CHECKPOINTING = "activation_checkpointing" if Version("5.23.0.dev0") <= TRANSFORMERS else "gradient_checkpointing"
"""The training argument that recomputes activations, and with `_enable` the model's method."""

# No public function of transformers tells a file that is not there from one that cannot be reached.


def file_of(name: str, file: str, *but: str, **hub: Any) -> str | None:
    """Path of a file of a folder or Hub repository, downloaded where need be; `None` where it has none.

    Args:
        name: of the folder or repository.
        file: its name there.
        but: what else gives `None`: `"gated_repo"`, `"connection_errors"`.
        hub: keywords of `cached_file`.
    """
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", *but)}
    return cached_file(name, file, **quiet, **hub)


if _RENAMED:
    CausalLMOutputWithPast = modeling_outputs.CausalLMOutputWithPast
    BaseModelOutputWithPast = modeling_outputs.BaseModelOutputWithPast
    GenerationMixin = transformers.GenerationMixin

    def takes_cache(function: Callable) -> Callable:
        """Let `function`, which has an argument `cache`, take it as `past_key_values` too, with a FutureWarning."""
        return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(function)

else:

    class _BothNames:
        """An output whose `past_key_values` answers to `cache` as well: attribute, key and `in`."""

        past_key_values: Any

        @property
        def cache(self) -> Any:
            return self.past_key_values

        def __getitem__(self, key: Any) -> Any:
            return super().__getitem__(_old(key))  # type: ignore[misc]

        def __contains__(self, key: Any) -> bool:
            return super().__contains__(_old(key))  # type: ignore[misc]

        def get(self, key: Any, default: Any = None) -> Any:
            return super().get(_old(key), default)  # type: ignore[misc]

    def _old(key: Any) -> Any:
        return "past_key_values" if key == "cache" else key

    class CausalLMOutputWithPast(_BothNames, modeling_outputs.CausalLMOutputWithPast):  # type: ignore[no-redef]
        pass

    class BaseModelOutputWithPast(_BothNames, modeling_outputs.BaseModelOutputWithPast):  # type: ignore[no-redef]
        pass

    _WITH_BOTH_NAMES: dict[type, type] = {}

    def _with_both_names(kind: type) -> type:
        if kind not in _WITH_BOTH_NAMES:
            members = {"__module__": kind.__module__}
            _WITH_BOTH_NAMES[kind] = type(kind.__name__, (_BothNames, kind), members)
        return _WITH_BOTH_NAMES[kind]

    class GenerationMixin(transformers.GenerationMixin):  # type: ignore[no-redef]
        """`generate` that takes and returns the cache as `cache` too."""

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            if "cache" in kwargs:
                if kwargs.get("past_key_values") is not None:
                    raise ValueError("pass the cache as cache or as past_key_values, not as both")
                kwargs["past_key_values"] = kwargs.pop("cache")
            output = super().generate(*args, **kwargs)
            if isinstance(output, ModelOutput):
                output.__class__ = _with_both_names(type(output))
            return output

    def takes_cache(function: Callable) -> Callable:
        """Let `function`, which has an argument `cache`, take it as `past_key_values` too, as generate passes it."""

        @functools.wraps(function)
        def renamed(*args: Any, **kwargs: Any) -> Any:
            if "past_key_values" in kwargs:
                if kwargs.get("cache") is not None:
                    raise ValueError("pass the cache as cache or as past_key_values, not as both")
                kwargs["cache"] = kwargs.pop("past_key_values")
            return function(*args, **kwargs)

        return renamed
