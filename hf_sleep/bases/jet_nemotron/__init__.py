"""Jet-Nemotron: a native port of the published models, and how they sleep."""

from .configuration import JetNemotronConfig
from .decoder import JetNemotronDecoder
from .modeling import JetNemotronForCausalLM, JetNemotronModel, JetNemotronPreTrainedModel

__all__ = [
    "JetNemotronConfig",
    "JetNemotronDecoder",
    "JetNemotronForCausalLM",
    "JetNemotronModel",
    "JetNemotronPreTrainedModel",
]
