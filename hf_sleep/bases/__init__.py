"""Base families: how their layers are run, and native models of those that transformers has none for.

Importing this registers the adapters and, with transformers' Auto classes, the native models.
"""

from . import gated_delta_net, kimi_linear, mamba2, rope, scales
from .decoder import Decoder, Rope, adapter_of, decoder_for
from .jet_nemotron import JetNemotronConfig, JetNemotronForCausalLM, JetNemotronModel, JetNemotronPreTrainedModel
from .ouro import OuroConfig, OuroForCausalLM, OuroModel, OuroPreTrainedModel
from .probe import Probe

__all__ = [
    "Decoder",
    "JetNemotronConfig",
    "JetNemotronForCausalLM",
    "JetNemotronModel",
    "JetNemotronPreTrainedModel",
    "OuroConfig",
    "OuroForCausalLM",
    "OuroModel",
    "OuroPreTrainedModel",
    "Probe",
    "Rope",
    "adapter_of",
    "decoder_for",
    "gated_delta_net",
    "kimi_linear",
    "mamba2",
    "rope",
    "scales",
]
