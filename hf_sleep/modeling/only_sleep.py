"""Checkpoints of the new weights alone: what they hold, and the base that they stand on."""

import copy
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..lm_config import SleepLMConfig
from .plain import source_of
from .pretrained import SleepPreTrainedModel

# What an only-sleep checkpoint holds, by the beginning of its name: all that a retrofit adds to its base.
NEW_WEIGHTS = ("fast_weights.", "between.")
# What from_pretrained takes to find a checkpoint, as opposed to what it takes to load it.
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")
# What an only-sleep checkpoint hands on to its base: how weights are laid out and computed with.
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
# What base and new weights get alike. All else is about the new weights' files: revision, subfolder, variant, …
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


class SleepBlocks(SleepPreTrainedModel):
    """The new weights alone, as an only-sleep checkpoint holds them.

    Args:
        config: of the sleeping model that they are a part of.
    """

    def __init__(self, config: SleepLMConfig):
        super().__init__(config)
        self.fast_weights, self.between = self.make_blocks(), self.make_between()
        self.keep_in_fp32()
        self.report: Any = None
        self.post_init()

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        model.report = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        return model.report

    def load_adapter(self, *_: Any, **__: Any) -> Any:
        # An adapter beside the weights is the whole model's: it is loaded there.
        return self.report


def for_the_hub(kwargs: dict) -> dict[str, Any]:
    """Those of from_pretrained's keywords that say where a checkpoint is."""
    return {key: kwargs[key] for key in HUB_KEYWORDS if kwargs.get(key) is not None}


def base_of(config: SleepLMConfig, kwargs: dict) -> tuple[PreTrainedModel, dict]:
    """Load the base of an only-sleep checkpoint, with the settings that it had when the checkpoint was written.

    Returns:
        It, and transformers' loading report.

    Raises:
        ValueError: a config that does not name its base, or names another one.
    """
    source = config.base_model_name_or_path
    if source is None:
        raise ValueError(
            "the checkpoint holds fast weights alone, and its config does not say of which base: "
            "pass base_model_name_or_path=..."
        )
    asked = {key: kwargs[key] for key in (*BASE_KEYWORDS, *SHARED_KEYWORDS) if kwargs.get(key) is not None}
    found = dict(config.base_source or {})
    if found.pop("of", None) == source_of(source):
        asked = found | asked
    if kwargs.get("use_safetensors"):
        asked["use_safetensors"] = True
    if isinstance(asked.get("device_map"), dict):
        asked["device_map"] = _map_of_base(asked["device_map"])
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    asked["dtype"] = dtype if dtype not in (None, "auto") else config.dtype or "auto"
    lookup = {key: asked[key] for key in (*HUB_KEYWORDS, "gguf_file") if key in asked}
    own = AutoConfig.from_pretrained(source, **lookup)
    if isinstance(own, SleepLMConfig):
        raise ValueError(
            f"the checkpoint holds fast weights alone, and {source}, where their base was, holds a sleep checkpoint: "
            "pass base_model_name_or_path=…, or load that one"
        )
    _check_same_base(config.text_config, own.get_text_config())
    text = copy.deepcopy(config.text_config)
    # Whether its files are quantised is for them to say.
    if getattr(own, "quantization_config", None) is not None:
        text.quantization_config = own.quantization_config
    elif hasattr(text, "quantization_config"):
        del text.quantization_config
    return AutoModelForCausalLM.from_pretrained(source, config=text, output_loading_info=True, **asked)


def _map_of_base(device_map: dict[str, Any]) -> dict[str, Any]:
    """Take the base's part of a device map, in the base's own names, whichever names the map uses."""
    return {
        name if not f"{name}.".startswith("lm.") else name.removeprefix("lm").removeprefix("."): device
        for name, device in device_map.items()
        if not f"{name}.".startswith(NEW_WEIGHTS)
    }


def joined_reports(base: dict, blocks: dict) -> dict:
    """Join the loading reports of a base and its blocks, in the names of the whole model."""
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
