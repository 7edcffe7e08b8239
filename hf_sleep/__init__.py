"""hf_sleep: pretrained language models that sleep."""

from .auto import AutoModelForSleepLM
from .bases import JetNemotronConfig, JetNemotronForCausalLM, OuroConfig, OuroForCausalLM
from .cache import SleepCache
from .config import SleepConfig
from .dtypes import default_dtype
from .engine import SleepEvent
from .lm_config import SleepLMConfig
from .lora import sleep_lora_config
from .modeling import SleepForCausalLM
from .registry import register_base
from .state import SleepState
from .version import __version__

__all__ = [
    "AutoModelForSleepLM",
    "JetNemotronConfig",
    "JetNemotronForCausalLM",
    "OuroConfig",
    "OuroForCausalLM",
    "SleepCache",
    "SleepConfig",
    "SleepEvent",
    "SleepForCausalLM",
    "SleepLMConfig",
    "SleepState",
    "__version__",
    "default_dtype",
    "register_base",
    "sleep_lora_config",
]
