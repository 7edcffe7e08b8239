"""`SleepForCausalLM`: a pretrained decoder LM that sleeps."""

from .causal_lm import SleepForCausalLM, SleepPreTrainedModel

__all__ = ["SleepForCausalLM", "SleepPreTrainedModel"]
