"""hf_sleep: pretrained language models that sleep."""

from .auto import AutoModelForSleepLM
from .cache import SleepCache
from .config import SleepConfig, SleepLMConfig
from .dtypes import default_dtype
from .lora import sleep_lora_config
from .modeling import SleepForCausalLM
from .models import JetNemotronConfig, JetNemotronForCausalLM, OuroConfig, OuroForCausalLM
from .sleep import SleepEvent
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
    "sleep_lora_config",
]
