"""AutoModelForSleepLM: one door for bases and for sleep checkpoints."""

import dataclasses
from typing import Any

from transformers import AutoConfig
from transformers.utils import logging

from .config import SleepConfig, SleepLMConfig
from .dtypes import dtype_to_load
from .modeling import HUB_KEYWORDS, SleepForCausalLM, load_base

logger = logging.get_logger(__name__)


class AutoModelForSleepLM:
    """Loads a base checkpoint and retrofits it, or loads a sleep checkpoint as it was saved."""

    def __init__(self) -> None:
        raise OSError(
            "AutoModelForSleepLM is made with AutoModelForSleepLM.from_pretrained(name_or_path, sleep=SleepConfig(...))"
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *, sleep: SleepConfig | dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """Load a model that sleeps.

        Args:
            pretrained_model_name_or_path: a Hub id or folder: of a base causal LM, which gets fresh fast-weight
                blocks, or of a sleep checkpoint.
            sleep: how to sleep. A dictionary sets just those fields of `SleepConfig`, of a sleep checkpoint's own where
                it is one: `sleep={"sleep_passes": 4}`. Of a sleep checkpoint the blocks cannot be changed.
            kwargs: as in `AutoModelForCausalLM.from_pretrained` (dtype, device_map, quantization_config, revision,
                …). Without `dtype` it is the checkpoint's own, but float32 where that would be computed by a CPU that
                has no 16-bit products: the same values, in twice the bytes. `dtype="auto"` keeps it in any case.

        Returns:
            A `SleepForCausalLM`; with `output_loading_info=True`, it and the report.

        Raises:
            ValueError: an unknown family, settings that do not fit the base, or blocks other than the checkpoint's.
        """
        lookup = {key: kwargs[key] for key in (*HUB_KEYWORDS, "trust_remote_code", "gguf_file") if key in kwargs}
        config = kwargs.get("config") or AutoConfig.from_pretrained(pretrained_model_name_or_path, **lookup)
        kwargs |= _native_dtype(config, kwargs)
        if not isinstance(config, SleepLMConfig):
            base, report = load_base(pretrained_model_name_or_path, kwargs)
            model = SleepForCausalLM.from_base(base, SleepConfig(**sleep) if isinstance(sleep, dict) else sleep)
            return model if report is None else (model, report)
        if sleep is not None:
            config.sleep = _change(config.sleep, sleep).resolve(config.text_config)
        return SleepForCausalLM.from_pretrained(pretrained_model_name_or_path, **{**kwargs, "config": config})


def _native_dtype(config: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The dtype to load with, where none was asked for and the checkpoint's own would be emulated; says so once."""
    asked = [kwargs.get(key) for key in ("dtype", "torch_dtype", "quantization_config")]
    if any(value is not None for value in asked) or getattr(config, "quantization_config", None) is not None:
        return {}
    if (dtype := dtype_to_load(config, kwargs.get("device_map"))) is None:
        return {}
    saved = str(config.dtype).removeprefix("torch.")
    logger.warning_once(
        f"The checkpoint is in {saved}, for which this CPU has no instructions: it is loaded in float32, many times "
        f'faster here and of the same values. Pass dtype="{saved}" to keep it.'
    )
    return {"dtype": dtype}


BLOCK_FIELDS = [
    f.name for f in dataclasses.fields(SleepConfig) if f.name.startswith("block_") or f.name == "num_blocks"
]


def _change(saved: SleepConfig, asked: SleepConfig | dict[str, Any]) -> SleepConfig:
    """A checkpoint's settings with those that were asked for; its blocks are what they are."""
    if isinstance(asked, SleepConfig):
        default = SleepConfig()
        values = {field.name: getattr(asked, field.name) for field in dataclasses.fields(SleepConfig)}
        asked = {k: v for k, v in values.items() if k not in BLOCK_FIELDS or v != getattr(default, k)}
    for name in BLOCK_FIELDS:
        if name in asked and asked[name] != getattr(saved, name):
            raise ValueError(
                f"SleepConfig.{name}={asked[name]!r} cannot work: the checkpoint's blocks have "
                f"{name}={getattr(saved, name)!r}. Leave it out"
            )
    return dataclasses.replace(saved, **asked)
