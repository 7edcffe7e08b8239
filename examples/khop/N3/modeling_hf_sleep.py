"""Loads this checkpoint with the package hf_sleep, which holds all of its code."""

try:
    from hf_sleep import SleepForCausalLM, SleepLMConfig
except ModuleNotFoundError as error:
    if error.name != "hf_sleep":
        raise
    raise ImportError(
        "This model sleeps, and its code is in the package hf_sleep, which is not installed here. "
        "Install it from a checkout of its repository, with `pip install -e .`, and load the model again."
    ) from error

__all__ = ["SleepForCausalLM", "SleepLMConfig"]
