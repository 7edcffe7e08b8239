"""Ouro: a native port of the published models, and how they sleep."""

from .configuration import OuroConfig
from .decoder import OuroDecoder
from .modeling import (
    OuroCausalLMOutput,
    OuroForCausalLM,
    OuroModel,
    OuroModelOutput,
    OuroPreTrainedModel,
    exit_distribution,
)

__all__ = [
    "OuroCausalLMOutput",
    "OuroConfig",
    "OuroDecoder",
    "OuroForCausalLM",
    "OuroModel",
    "OuroModelOutput",
    "OuroPreTrainedModel",
    "exit_distribution",
]
