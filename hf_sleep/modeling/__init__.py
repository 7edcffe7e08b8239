"""`SleepForCausalLM`: a pretrained decoder LM that sleeps."""

from .causal_lm import SleepForCausalLM
from .pretrained import SleepPreTrainedModel

__all__ = ["SleepForCausalLM", "SleepPreTrainedModel"]
