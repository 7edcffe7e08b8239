"""Reading a checkpoint's weights back, where they stand under the names that the base was published with."""

import json
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import Trainer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..modeling import SleepForCausalLM


class PublishedNames(Trainer):
    """A Trainer that resumes from a sleep checkpoint, and loads the best, whatever names its weights have there.

    They are those that the base was published with. In some families (mixtures of experts, OLMo Hybrid, Kimi Linear)
    the model has others, or several tensors as one, and the Trainer's own `load_state_dict` would leave them out.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        if self._has_other_names(resume_from_checkpoint, model):
            self._issue_warnings_after_load(load_published(model, resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self._has_other_names(best, self.model):
            self._issue_warnings_after_load(load_published(self.model, best))
        else:
            super()._load_best_model()

    def _has_other_names(self, folder: str | None, model: Any) -> bool:
        if folder is None or not isinstance(model, SleepForCausalLM):
            return False
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled) and bool(other_names(model, weights_of(folder)))


def weights_of(folder: str) -> dict[str, Path]:
    """The file of every tensor of a checkpoint, by the tensor's name there; empty where it has no safetensors."""
    index, whole = Path(folder, SAFE_WEIGHTS_INDEX_NAME), Path(folder, SAFE_WEIGHTS_NAME)
    if whole.is_file():
        with safe_open(whole, "pt") as file:
            return dict.fromkeys(file.keys(), whole)
    if not index.is_file():
        return {}
    return {
        name: index.parent / file for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
    }


def other_names(model: SleepForCausalLM, names: Any) -> set[str]:
    """Those of `names` that are the base's, and that the model has not."""
    return {name for name in names if name.startswith("lm.")} - model.state_dict().keys()


def load_published(model: SleepForCausalLM, folder: str) -> Any:
    """Give a model the weights of a checkpoint of it, as `from_pretrained` reads them.

    Returns:
        Which are missing, and which were there besides, as `load_state_dict` says.
    """
    # The widest, so that none is rounded.
    dtype = reduce(torch.promote_types, (p.dtype for p in model.parameters() if p.is_floating_point()))
    state, own = SleepForCausalLM.from_pretrained(folder, dtype=dtype).state_dict(), model.state_dict().keys()
    for name, path in weights_of(folder).items():
        if name in own and name not in state:  # a module that was added to the model
            with safe_open(path, "pt") as file:
                state[name] = file.get_tensor(name)
    return model.load_state_dict(state, strict=False)
