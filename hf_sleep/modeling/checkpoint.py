"""Saving, pushing and loading a model that sleeps."""

import copy
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.peft import maybe_load_adapters
from transformers.utils import CONFIG_NAME, logging

from ..compat import file_of
from ..config import SleepConfig
from ..engine import pass_policy, policy_fields
from ..hub import (
    AUTO_MAP,
    CardFacts,
    Repository,
    drop_older_weights,
    forget_folders,
    hub_id,
    is_untrained,
    weight_files,
    write_model_card,
    write_remote_code,
)
from ..lm_config import SleepLMConfig, check_keywords, check_model_type
from ..placement import is_sharded
from ..state import fingerprint
from ..weights import checksum
from .only_sleep import (
    BASE_KEYWORDS,
    HUB_KEYWORDS,
    NEW_WEIGHTS,
    SleepBlocks,
    base_of,
    for_the_hub,
    joined_reports,
)
from .plain import has_adapter
from .pretrained import SleepPreTrainedModel

logger = logging.get_logger(__name__)

# What save_pretrained hands on to push_to_hub.
PUSH_KEYWORDS = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


class CheckpointMixin(SleepPreTrainedModel):
    """Saves a `SleepForCausalLM`, pushes it to the Hub, and loads it again."""

    lm: PreTrainedModel
    fast_weights: nn.ModuleDict
    card: CardFacts

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Take weights under this model's names, as any module does.

        Raises:
            ValueError: of `strict=False`, the base's weights under other names, which would be left out.
        """
        of_base = {name for name in state_dict if name.startswith("lm.")}
        missing = {name for name, _ in self.lm.named_parameters(prefix="lm")} - of_base
        if not strict and missing and (foreign := of_base - self.state_dict().keys()):
            raise ValueError(
                f"{len(foreign)} weights of the base have names that this model has not ({min(foreign)}, …), such as "
                "the base was published with: they would be left out. Load the checkpoint with from_pretrained; to "
                "resume training, or to load the best model at its end, use SleepTrainer"
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        only_sleep: bool = False,
        push_to_hub: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a checkpoint with its model card. A README.md that a person wrote stays.

        Args:
            save_directory: a folder, made where missing.
            only_sleep: write the new weights alone. The base is loaded again from where it came from.
            push_to_hub: push it as well, with `push_to_hub`'s arguments; `repo_id` is the folder's name by default.
            state_dict: the weights, where they are not all here (sharded ones that were gathered).
            kwargs: as in `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: a checkpoint that could not be loaded again.
        """
        self._check_not_over_base(only_sleep, save_directory)
        if push_to_hub:
            hub = {key: kwargs.pop(key) for key in PUSH_KEYWORDS if key in kwargs}
            repo_id = hub.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, only_sleep=only_sleep, state_dict=state_dict, **hub, **kwargs)
        self._check_loads_again(only_sleep, state_dict)
        self._save(save_directory, Path(save_directory).resolve().name, only_sleep, state_dict, **kwargs)

    def _check_loads_again(self, only_sleep: bool, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Raise `ValueError` unless a checkpoint would be all that this model is."""
        if state_dict is None and is_sharded(self):
            raise ValueError(
                "the model's weights are sharded over ranks (FSDP): save with trainer.save_model() on all ranks, or "
                "pass the gathered ones as state_dict"
            )
        if getattr(self, "peft_config", None) is not None and not self._hf_peft_config_loaded:
            raise ValueError(
                "the model carries PEFT adapters: call save_pretrained of the PeftModel for the adapter, or save what "
                "its merge_and_unload() returns"
            )
        if not self._hf_peft_config_loaded and has_adapter(self.lm) and not hasattr(self, "peft_config"):
            raise ValueError(
                "the base carries a PEFT adapter, whose names no loaded base has: merge it (merge_and_unload) and "
                "retrofit the result"
            )
        if not only_sleep:
            if self.quantizer is not None:
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
        if not is_base_of(self.config, self.lm):
            raise ValueError(
                "only_sleep=True would lose what the base learned: its weights are no longer those it was loaded with. "
                "Save everything"
            )
        if not any(name.startswith(NEW_WEIGHTS) for name, _ in self.named_parameters()):
            raise ValueError(
                "only_sleep=True: this model has no injected blocks, its fast weights are the base's own layers"
            )

    def _base_source(self) -> tuple[str | None, dict[str, Any]]:
        """Where the base is, and which of the files there."""
        base, source = self.config.base_model_name_or_path, self.config.base_source or {}
        return base, source if source.get("of") == base else {}

    def _check_not_over_base(self, only_sleep: bool, folder: str | os.PathLike) -> None:
        """Raise `ValueError` where new weights alone would replace the base that they need."""
        base, source = self._base_source()
        if only_sleep and base and Path(base, source.get("subfolder", "")).resolve() == Path(folder).resolve():
            raise ValueError(
                f"only_sleep=True into {folder} would replace the base that is there, which the new weights need: save "
                "to another folder"
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
            # Where transformers added the adapters, it writes the adapter alone.
            super().save_pretrained(folder, state_dict=state_dict, **kwargs)
            return
        if only_sleep:
            state_dict = {k: v for k, v in (state_dict or self.state_dict()).items() if k.startswith(NEW_WEIGHTS)}
        blocks = self.fast_weights.state_dict(prefix="fast_weights.") if state_dict is None else state_dict
        if getattr(self.generation_config, "sleep_passes", None) is not None:
            # Loading a generation config that was made of a model's config drops what transformers does not know.
            self.generation_config._from_model_config = False
            self.generation_config.sleep_passes = policy_fields(pass_policy(self.generation_config.sleep_passes))
        # trust_remote_code marks the class, and then saving would copy its file. The code stays in the package.
        self.config._auto_class = None
        self.config.auto_map, self.config.only_sleep = dict(AUTO_MAP), only_sleep
        before = weight_files(folder)
        try:
            super().save_pretrained(folder, state_dict=state_dict, **kwargs)
            if kwargs.get("is_main_process", True):
                drop_older_weights(folder, before)
                write_remote_code(folder)
                write_model_card(self, folder, name, untrained=is_untrained(blocks), **(card or {}))
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
    ) -> CommitInfo | None:
        """Write a checkpoint to the Hub, with a model card unless a person wrote the one that is there.

        Of several processes the main one pushes (`is_main_process`); the others return `None`.

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
            ValueError: a checkpoint that could not be loaded again, here or by others.
        """
        self._check_loads_again(only_sleep, state_dict)
        if not kwargs.get("is_main_process", True):
            return None
        base, source = self._base_source()
        if only_sleep and hub_id(base) is None:
            raise ValueError(
                f"only_sleep=True would send those who load {repo_id} to {base!r}, a folder of this machine: set "
                "config.base_model_name_or_path to the base's id on the Hub, or push everything"
            )
        hub = Repository(repo_id, private, token, revision, create_pr)
        branch = source.get("revision", "main")
        if only_sleep and not source.get("subfolder") and (hub.repo_id, revision or "main") == (base, branch):
            raise ValueError(
                f"only_sleep=True into {repo_id} would replace the base that is there, which the new weights need: "
                "push to another repository"
            )
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
            kwargs: as in `PreTrainedModel.from_pretrained`, fields of the config among them. Fields of the base's
                config are set as `text_config={...}`. Of an only-sleep checkpoint, the base gets what says how weights
                are laid out and computed with (dtype, device_map, quantization_config, attn_implementation, …), and
                each block follows the layer that it stands after. The new weights get what says where a checkpoint is
                (revision, subfolder, variant, …).

        Raises:
            ValueError: a checkpoint of another kind, such as a base that was not retrofitted.
            TypeError: a keyword that nothing takes.
        """
        name = pretrained_model_name_or_path
        hub = for_the_hub(kwargs)
        adapter, name, adapter_kwargs = maybe_load_adapters(name, hub, **(kwargs.pop("adapter_kwargs", None) or {}))
        if adapter is not None:
            adapter_kwargs["_adapter_model_path"] = adapter
        config, kwargs = _config_of(name, config, hub, kwargs)
        if sleep is not None:
            config.sleep = config.sleep.changed(sleep).resolve(config.text_config)
        if not config.only_sleep:
            if kwargs.get("quantization_config") is not None:
                raise ValueError(
                    "quantization_config: the checkpoint holds base and new weights in one, and the new ones must not "
                    "be quantised. Save it with only_sleep=True, and load that so"
                )
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
        """Load an only-sleep checkpoint: the base from where it came, then the new weights on it."""
        base, base_report = base_of(config, kwargs)
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
        model = cls.from_base(base, config.sleep, config.probed)
        # What is missing stays as a fresh retrofit has it.
        fresh = {*missing, *(key for key, *_ in report["mismatched_keys"])}
        loaded = {key: weight for key, weight in blocks.state_dict().items() if key not in fresh}
        model.load_state_dict(loaded, strict=False)
        _give_config(model, config, name)
        hub = for_the_hub(kwargs)
        default = {"revision": "main", "subfolder": "", "force_download": False, "local_files_only": False}
        download: dict[str, Any] = dict.fromkeys(HUB_KEYWORDS) | default | hub
        model.adjust_generation_fn(
            generation_config, False, None, name, **download, trust_remote_code=trust_remote_code
        )
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


def _config_of(
    name: Any, given: PreTrainedConfig | str | os.PathLike | None, hub: dict, kwargs: dict
) -> tuple[SleepLMConfig, dict]:
    """Read a sleep checkpoint's config, ours to change, with the fields that `kwargs` name.

    Returns:
        It, and the `kwargs` that are no fields.
    """
    if isinstance(given, PreTrainedConfig):
        file = None
        if name is not None:
            file = file_of(name, CONFIG_NAME, **hub)
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


def is_base_of(config: SleepLMConfig, lm: PreTrainedModel) -> bool:
    """Tell whether a base has the weights that a config says it had; of configs before there were checksums, some.

    Raises:
        ValueError: weights that are sharded over ranks.
    """
    found = fingerprint(lm)
    return config.base_fingerprint == found if config.base_checksum is None else config.base_checksum == checksum(lm)


def is_same_base(one: SleepLMConfig, other: SleepLMConfig) -> bool:
    """Tell whether two configs are of a base with the same weights, as far as they say."""
    if None not in (one.base_checksum, other.base_checksum):
        return one.base_checksum == other.base_checksum
    return one.base_fingerprint in (None, other.base_fingerprint)


def _give_config(model: Any, config: SleepLMConfig, name: Any) -> None:
    """Give a model that was made on a loaded base its checkpoint's config, but what that base says of itself."""
    made = model.config
    if not is_same_base(config, made):
        logger.warning(
            f"The base loaded from {config.base_model_name_or_path} has other weights than the one these fast "
            "weights were made with (another revision or quantisation?): what they remember may not fit it."
        )
    attention, experts = made._attn_implementation, made._experts_implementation
    for field in ("text_config", "dtype", "base_fingerprint", "base_checksum", "only_sleep"):
        setattr(config, field, getattr(made, field))
    config._attn_implementation, config._experts_implementation = attention, experts
    model.config = config
    if name is not None:
        model.name_or_path = config.name_or_path = str(name)
