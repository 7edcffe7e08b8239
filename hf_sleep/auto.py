"""AutoModelForSleepLM: one door for bases and for sleep checkpoints."""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.peft import maybe_load_adapters
from transformers.utils import logging

from .config import SETTINGS, SleepConfig
from .dtypes import dtype_to_load
from .lm_config import SleepLMConfig, check_keywords
from .modeling import SleepForCausalLM
from .modeling.only_sleep import HUB_KEYWORDS, NEW_WEIGHTS, for_the_hub, joined_reports

logger = logging.get_logger(__name__)

OF_CODE = ("trust_remote_code", "code_revision")
OF_BASE = ("revision", "subfolder", "variant", "gguf_file")
"""What says which of a place's files the base is, besides the place."""


class AutoModelForSleepLM:
    """Loads a base checkpoint and retrofits it, or loads a sleep checkpoint as it was saved."""

    def __init__(self) -> None:
        raise OSError(
            "AutoModelForSleepLM has no instances: call AutoModelForSleepLM.from_pretrained(name_or_path, sleep=...)"
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *, sleep: SleepConfig | dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """Load a model that sleeps.

        Args:
            pretrained_model_name_or_path: a Hub id or folder: of a base causal LM, which gets fresh fast-weight blocks,
                or of a sleep checkpoint.
            sleep: how to sleep. A dictionary sets just the fields that it names, of `SleepConfig()` or of the sleep
                checkpoint's own: `sleep={"sleep_passes": 4}`. The blocks of a sleep checkpoint cannot be changed.
            kwargs: as in `AutoModelForCausalLM.from_pretrained` (dtype, device_map, quantization_config, revision, …).
                Without `dtype` a checkpoint is loaded in its own, but in float32 where a CPU would have to emulate
                that: the same values, in twice the bytes. `dtype="auto"` keeps the checkpoint's in any case.

        Returns:
            A `SleepForCausalLM`; with `output_loading_info=True`, it and the report.

        Raises:
            ValueError: an unknown family, settings that do not fit the base, blocks other than the checkpoint's, or an
                adapter of a base.
            TypeError: a setting of the sleep that was passed by itself, and not in `sleep`.
        """
        if sleep is not None and not isinstance(sleep, SleepConfig | dict):
            raise ValueError(f"sleep={sleep!r}: it must be a SleepConfig, or a dictionary of its fields")
        for name in () if not isinstance(sleep, dict) else sleep.keys() - {*SETTINGS, "version"}:
            raise ValueError(f"sleep has {name!r}, which is no setting of sleep: it takes {', '.join(SETTINGS)}")
        lookup = {key: kwargs[key] for key in (*HUB_KEYWORDS, *OF_CODE, "gguf_file") if key in kwargs}
        adapter, name, _ = maybe_load_adapters(
            pretrained_model_name_or_path, for_the_hub(kwargs), **(kwargs.get("adapter_kwargs") or {})
        )
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):
            config = AutoConfig.from_pretrained(config or name, **lookup)
        kwargs |= _native_dtype(config, kwargs)
        if isinstance(config, SleepLMConfig):
            kwargs.pop("code_revision", None)  # its code is this package's
            return SleepForCausalLM.from_pretrained(pretrained_model_name_or_path, sleep=sleep, **kwargs)
        if adapter is not None:
            raise ValueError(
                f"{adapter} holds an adapter for {name}, which does not sleep. Merge it first (merge_and_unload of the "
                "PeftModel), then retrofit the result with SleepForCausalLM.from_base, and save it whole"
            )
        check_keywords(kwargs, config)
        base, report = _load_base(pretrained_model_name_or_path, kwargs)
        model = SleepForCausalLM.from_base(base, SleepConfig(**sleep) if isinstance(sleep, dict) else sleep)
        if source := {key: kwargs[key] for key in OF_BASE if kwargs.get(key)}:
            model.config.base_source = {"of": model.config.base_model_name_or_path} | source
        if report is None:
            return model
        new = {name for name in model.state_dict() if name.startswith(NEW_WEIGHTS)}
        return model, joined_reports(report, {"missing_keys": new})


def _native_dtype(config: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Choose the dtype to load with, where none was asked for and the checkpoint's own would be emulated.

    Returns:
        A keyword for `from_pretrained`, or none; says so once where there is one.
    """
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


def _load_base(source: Any, kwargs: dict) -> tuple[PreTrainedModel, dict | None]:
    """Load a base model, with its loading report where `output_loading_info` asks for it."""
    base = AutoModelForCausalLM.from_pretrained(source, **kwargs)
    return base if isinstance(base, tuple) else (base, None)
