"""Native models for published checkpoints that transformers has no model for; importing them registers them."""

from .jet_nemotron import JetNemotronConfig, JetNemotronForCausalLM, JetNemotronModel, JetNemotronPreTrainedModel
from .ouro import OuroConfig, OuroForCausalLM, OuroModel, OuroPreTrainedModel

__all__ = [
    "JetNemotronConfig",
    "JetNemotronForCausalLM",
    "JetNemotronModel",
    "JetNemotronPreTrainedModel",
    "OuroConfig",
    "OuroForCausalLM",
    "OuroModel",
    "OuroPreTrainedModel",
]
