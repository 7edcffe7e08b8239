"""A sleeping model without its head."""

from typing import TYPE_CHECKING, Any

from torch import nn

from ..compat import BaseModelOutputWithPast

if TYPE_CHECKING:
    from .causal_lm import SleepForCausalLM


class Headless(nn.Module):
    """A sleeping model that stops before its head: it reads and sleeps as the model does.

    `base_model` is one, for those who apply the head themselves, as TRL's trainers do from within the model's forward.
    It calls the class's own forward: theirs has taken the place of the instance's, and hooks have run.

    Args:
        model: a `SleepForCausalLM`.
    """

    def __init__(self, model: "SleepForCausalLM"):
        super().__init__()
        self.model, self.config = model, model.config
        self._tp_plan, self._pp_plan = model._tp_plan, model._pp_plan

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        """Run `SleepForCausalLM.forward` without labels: `last_hidden_state` `[B, T, C]` instead of logits."""
        return type(self.model).forward(self.model, *args, **kwargs, skip_head=True)
