"""hf_sleep: pretrained language models that sleep."""

from .auto import AutoModelForSleepLM
from .cache import SleepCache
from .config import SleepConfig, SleepLMConfig
from .modeling import SleepForCausalLM
from .state import SleepState
from .version import __version__

__all__ = [
    "AutoModelForSleepLM",
    "SleepCache",
    "SleepConfig",
    "SleepForCausalLM",
    "SleepLMConfig",
    "SleepState",
    "__version__",
]
