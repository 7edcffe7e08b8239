"""hf_sleep: pretrained language models that sleep."""

from .auto import AutoModelForSleepLM
from .bases import Decoder, JetNemotronConfig, JetNemotronForCausalLM, OuroConfig, OuroForCausalLM
from .batching import SessionBatch
from .cache import SleepCache
from .config import SleepConfig
from .dtypes import default_dtype
from .engine import Between, Eviction, PassEvent, PassPolicy, SleepEvent, UntilSettled, WithinSeconds
from .layers import FastWeightMixer
from .lm_config import SleepLMConfig
from .lora import sleep_lora_config
from .memory import FastWeights
from .modeling import SleepForCausalLM
from .pipeline import SleepTextGenerationPipeline
from .registry import register_base, register_between, register_block, register_eviction, register_pass_policy
from .session import SleepSession
from .state import SleepState
from .static_cache import StaticSleepCache
from .steps import cache_from
from .store import SleepStore
from .streaming import SleepStreamer
from .suggest import LoopSuggestion, suggest_loop
from .version import __version__

__all__ = [
    "AutoModelForSleepLM",
    "Between",
    "Decoder",
    "Eviction",
    "FastWeightMixer",
    "FastWeights",
    "JetNemotronConfig",
    "JetNemotronForCausalLM",
    "LoopSuggestion",
    "OuroConfig",
    "OuroForCausalLM",
    "PassEvent",
    "PassPolicy",
    "SessionBatch",
    "SleepCache",
    "SleepConfig",
    "SleepEvent",
    "SleepForCausalLM",
    "SleepLMConfig",
    "SleepSession",
    "SleepState",
    "SleepStore",
    "SleepStreamer",
    "SleepTextGenerationPipeline",
    "StaticSleepCache",
    "UntilSettled",
    "WithinSeconds",
    "__version__",
    "cache_from",
    "default_dtype",
    "register_base",
    "register_between",
    "register_block",
    "register_eviction",
    "register_pass_policy",
    "sleep_lora_config",
    "suggest_loop",
]
