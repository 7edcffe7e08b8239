"""Reading a checkpoint's weights back, as they were written: under the names that the base was published with."""

from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.utils import CONFIG_NAME

from ..modeling import SleepForCausalLM


class WholeCheckpoints(Trainer):
    """A Trainer that loads the weights of a sleep checkpoint by `from_pretrained`, to resume or as the best.

    A checkpoint has the base's weights under the names that it was published with. In some families (mixtures of
    experts, OLMo Hybrid, Kimi Linear) the model has others, or several tensors as one, and the Trainer's own
    `load_state_dict` would leave out what it cannot name.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        if self._is_whole(resume_from_checkpoint, model):
            load_weights(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self._is_whole(best, self.model):
            load_weights(self.model, best)
        else:
            super()._load_best_model()

    def _is_whole(self, folder: str | None, model: Any) -> bool:
        is_plain = isinstance(model, SleepForCausalLM) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        return is_plain and folder is not None and Path(folder, CONFIG_NAME).is_file()


def load_weights(model: SleepForCausalLM, folder: str) -> None:
    """Give a model the weights of a checkpoint of it."""
    model.load_state_dict(SleepForCausalLM.from_pretrained(folder, dtype=model.dtype).state_dict())
