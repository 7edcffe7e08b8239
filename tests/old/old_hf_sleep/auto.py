"""AutoModelForSleepLM: one door for bases and for sleep checkpoints."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.integrations.peft import maybe_load_adapters
from transformers.utils import logging

from .config import SleepConfig, SleepLMConfig, check_keywords
from .dtypes import dtype_to_load
from .modeling import HUB_KEYWORDS, SleepForCausalLM, joined_reports, load_base

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
            ValueError: an unknown family, settings that do not fit the base, blocks other than the checkpoint's, or an
                adapter of a base.
            TypeError: a setting of the sleep that is not in `sleep`.
        """
        lookup = {key: kwargs[key] for key in (*HUB_KEYWORDS, "trust_remote_code", "gguf_file") if key in kwargs}
        hub = {key: lookup[key] for key in HUB_KEYWORDS if lookup.get(key) is not None}
        adapter, name, _ = maybe_load_adapters(
            pretrained_model_name_or_path, hub, **(kwargs.get("adapter_kwargs") or {})
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
                "PeftModel), then retrofit the result with SleepForCausalLM.from_base"
            )
        check_keywords(kwargs, config)
        base, report = load_base(pretrained_model_name_or_path, kwargs)
        model = SleepForCausalLM.from_base(base, SleepConfig(**sleep) if isinstance(sleep, dict) else sleep)
        if report is None:
            return model
        blocks = {f"fast_weights.{name}" for name in model.fast_weights.state_dict()}
        return model, joined_reports(report, {"missing_keys": blocks})


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
