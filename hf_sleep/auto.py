"""AutoModelForSleepLM: one door for bases and for sleep checkpoints."""

import dataclasses
from typing import Any

from transformers import AutoConfig

from .config import SleepConfig, SleepLMConfig
from .modeling import HUB_KEYWORDS, SleepForCausalLM, load_base


class AutoModelForSleepLM:
    """Loads a base checkpoint and retrofits it, or loads a sleep checkpoint as it was saved."""

    def __init__(self) -> None:
        raise OSError(
            "AutoModelForSleepLM is made with AutoModelForSleepLM.from_pretrained(name_or_path, sleep=SleepConfig(...))"
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *, sleep: SleepConfig | None = None, **kwargs: Any
    ) -> Any:
        """Load a model that sleeps.

        Args:
            pretrained_model_name_or_path: a Hub id or folder: of a base causal LM, which gets fresh fast-weight
                blocks, or of a sleep checkpoint.
            sleep: how to sleep. With a sleep checkpoint it may change everything but the blocks.
            kwargs: as in `AutoModelForCausalLM.from_pretrained` (dtype, device_map, quantization_config, revision,
                …).

        Returns:
            A `SleepForCausalLM`; with `output_loading_info=True`, it and the report.

        Raises:
            ValueError: an unknown family, settings that do not fit the base, or blocks other than the checkpoint's.
        """
        lookup = {key: kwargs[key] for key in (*HUB_KEYWORDS, "trust_remote_code", "gguf_file") if key in kwargs}
        config = kwargs.get("config") or AutoConfig.from_pretrained(pretrained_model_name_or_path, **lookup)
        if not isinstance(config, SleepLMConfig):
            base, report = load_base(pretrained_model_name_or_path, kwargs)
            model = SleepForCausalLM.from_base(base, sleep)
            return model if report is None else (model, report)
        if sleep is not None:
            config.sleep = _with_blocks_of(config.sleep, sleep).resolve(config.text_config)
        return SleepForCausalLM.from_pretrained(pretrained_model_name_or_path, **{**kwargs, "config": config})


def _with_blocks_of(saved: SleepConfig, asked: SleepConfig) -> SleepConfig:
    """`asked`, with the blocks that the checkpoint has; a block field that was set to something else is refused."""
    default = SleepConfig()
    blocks = [f.name for f in dataclasses.fields(SleepConfig) if f.name.startswith("block_") or f.name == "num_blocks"]
    for name in blocks:
        if getattr(asked, name) not in (getattr(default, name), getattr(saved, name)):
            raise ValueError(
                f"SleepConfig.{name}={getattr(asked, name)!r} cannot work: the checkpoint's blocks have "
                f"{name}={getattr(saved, name)!r}. Leave it out"
            )
    return dataclasses.replace(asked, **{name: getattr(saved, name) for name in blocks})
