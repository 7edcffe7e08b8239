"""Config of a sleeping model, which its checkpoint carries."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .config import SleepConfig
from .registry import BASES


def check_model_type(model_type: str | None, source: Any) -> None:
    """Raise `ValueError` unless `model_type`, which was found in `source`, is a sleeping model's."""
    if model_type != SleepLMConfig.model_type:
        raise ValueError(
            f"{source} has model_type={model_type!r}, so it is no checkpoint of a sleeping model. "
            "To retrofit a base model, use AutoModelForSleepLM.from_pretrained(name_or_path, sleep=SleepConfig(...))"
        )


def check_keywords(kwargs: Mapping[str, Any], text: PreTrainedConfig) -> None:
    """Raise `TypeError` where a keyword of from_pretrained is a setting of the sleep and no field of the base's."""
    for field in dataclasses.fields(SleepConfig):
        if field.name in kwargs and not hasattr(text, field.name):
            raise TypeError(
                f"{field.name} is a setting of the sleep: pass sleep={{{field.name!r}: {kwargs[field.name]!r}}}"
            )


class SleepLMConfig(PreTrainedConfig):
    """Config of a `SleepForCausalLM`: a base decoder's config and how it sleeps.

    Args:
        text_config: the base decoder's config, or its dictionary.
        sleep: `SleepConfig`, or its dictionary; resolved against `text_config`.
        base_model_name_or_path: folder or Hub id of the base, for cards, and to load an only-sleep checkpoint.
        base_source: keywords that find the base, where it is not at the root of the main branch or not in the usual
            files: `revision`, `subfolder`, `variant`, `gguf_file`; and the name that they go with, `of`.
        base_fingerprint: digest of the base's weights, by which an only-sleep checkpoint knows its base again.
        base_checksum: of every value of them, by which it is known that the base has not learned, and the new weights
            may be saved alone; a checkpoint from before there was one has none.
        only_sleep: whether the checkpoint holds the new weights alone, and the base is loaded from
            `base_model_name_or_path`.
        use_cache: whether a forward that is not told returns a cache.
        probed: of a base of an unlisted family, what was found equal when it was retrofitted (`hf_sleep.bases.Probe`).
        base_module: the module that registered the base's family from outside of this package.
    """

    model_type = "sleep_lm"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    text_config: Any = None
    sleep: Any = None
    base_model_name_or_path: str | None = None
    base_source: dict[str, str] | None = None
    base_fingerprint: str | None = None
    base_checksum: str | None = None
    only_sleep: bool = False
    use_cache: bool = True
    probed: dict[str, Any] | None = None
    base_module: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            # PreTrainedConfig compares itself with a default instance when it writes its JSON.
            self.text_config = CONFIG_MAPPING["llama"]()
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            model_type = fields.pop("model_type", None)
            self._check_imported(model_type)
            if model_type not in CONFIG_MAPPING:
                raise ValueError(
                    f"SleepLMConfig.text_config has model_type={model_type!r}, which this transformers does not know: "
                    "it must be the config of a decoder, with its model_type. Of a model with code of its own, import "
                    "what registers it with AutoConfig and AutoModelForCausalLM first"
                )
            self.text_config = CONFIG_MAPPING[model_type](**fields)
        self._check_imported(self.text_config.model_type)
        self.base_module = BASES.module_of(self.text_config.model_type)
        if not isinstance(self.sleep, SleepConfig):
            self.sleep = SleepConfig.from_dict(self.sleep or {})
        self.sleep = self.sleep.resolve(self.text_config)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        given = kwargs.pop("vocab_size", None)
        if given not in (None, self.vocab_size):
            raise ValueError(f"vocab_size={given}, but text_config.vocab_size={self.vocab_size}: set the latter alone")
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if kwargs.get(token) is None:
                kwargs[token] = getattr(self.text_config, token, None)
        super().__post_init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """The base's, which PEFT asks for here: whether embeddings were resized, and go with an adapter."""
        return self.text_config.vocab_size

    def _check_imported(self, model_type: str | None) -> None:
        """Raise `ValueError` where the base's family was registered by a package that is not imported."""
        if self.base_module is not None and model_type not in BASES:
            raise ValueError(
                f"SleepLMConfig.text_config has model_type={model_type!r}: {BASES.what_works(self.base_module)}"
            )

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a checkpoint's config.json as a dictionary, and return the keywords that are left.

        Raises:
            ValueError: the config of another kind of model.
        """
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        check_model_type(values.get("model_type"), pretrained_model_name_or_path)
        return values, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read what `to_dict` wrote. A keyword sets a field; `sleep` and `text_config` set just what they name."""
        if (size := kwargs.get("vocab_size")) is not None:
            raise TypeError(f"vocab_size is a setting of the base: pass text_config={{'vocab_size': {size!r}}}")
        asked = kwargs.pop("sleep", None) or {}
        choices = {f"_{key}": kwargs[key] for key in ("attn_implementation", "experts_implementation") if key in kwargs}
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        for name, choice in choices.items():
            setattr(config, name, choice)  # again: a text_config that was set after it has not got it
        config.sleep = config.sleep.changed(asked).resolve(config.text_config)
        return made

    def imports(self) -> list[str]:
        """Modules from outside this package that have to be imported before this config can be read."""
        sleep = self.sleep.to_dict()
        policy = sleep["sleep_passes"]
        named = {*sleep.get("imports", {}).values(), self.base_module}
        named.add(policy.get("module") if isinstance(policy, dict) else None)
        return sorted(module for module in named if module is not None)

    def to_dict(self) -> dict[str, Any]:
        """Make the dictionary that is written to config.json, with `sleep` as plain values."""
        output = super().to_dict()
        output["sleep"] = self.sleep.to_dict()
        for name in ("probed", "base_module", "base_source"):
            if output[name] is None:
                del output[name]
        return output
