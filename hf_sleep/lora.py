"""A sleeping model and PEFT, which is imported when it is asked for: the LoRA configuration that fits, and back."""

from typing import TYPE_CHECKING, Any

from .cache import unwrapped
from .modeling import SleepForCausalLM

if TYPE_CHECKING:
    from peft import LoraConfig

# Of hybrids, too: Qwen3-Next's linear layers have an in_proj_qkvz, Granite 4's MLPs an input_linear.
PROJECTIONS = r"lm\..*_(proj(_\w+)?|linear)"


def sleep_lora_config(model: SleepForCausalLM, r: int = 8, **fields: Any) -> "LoraConfig":
    """LoRA on every projection of the base; the fast-weight blocks, which start from nothing, are trained in full.

    Not a projection, and left as it is: what generates the convolution's taps in Jet-Nemotron's own layers.

    Args:
        model: a sleeping model, not yet wrapped by PEFT.
        r: rank of the adapters.
        fields: of `peft.LoraConfig`, in place of what is set here; `modules_to_save` is added to the blocks.

    Raises:
        TypeError: a model that does not sleep.
    """
    from peft import LoraConfig

    if not isinstance(model, SleepForCausalLM):
        raise TypeError(f"sleep_lora_config needs a SleepForCausalLM before PEFT wraps it, not {type(model).__name__}")
    # PEFT has no form for all blocks at once: it refuses their ModuleDict.
    blocks = [f"fast_weights.{layer}" for layer in model.fast_weights]
    between = ["between"] if any(True for _ in model.between.parameters()) else []
    in_full = [*blocks, *between, *(fields.pop("modules_to_save", None) or ())]
    defaults: dict[str, Any] = {"r": r, "lora_alpha": 2 * r, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM"}
    return LoraConfig(**defaults | fields, modules_to_save=in_full or None)


def without_wrapper(model: Any) -> SleepForCausalLM:
    """The sleeping model that a `PeftModel` wraps, whose layers carry the adapter; or `model` itself.

    Raises:
        TypeError: a model that does not sleep, or an adapter that is not in its layers.
    """
    sleeping = unwrapped(model)
    if not isinstance(sleeping, SleepForCausalLM):
        raise TypeError(
            f"model is a {type(sleeping).__name__}, which does not sleep: load it with "
            "AutoModelForSleepLM.from_pretrained, or retrofit it with SleepForCausalLM.from_base"
        )
    refuse_prompts(model)
    return sleeping


def refuse_prompts(model: Any) -> None:
    """Raise `TypeError` for a `PeftModel` that learns a prompt, which it would read before every window and token.

    Or that is switched on by tokens (aLoRA), whose place it would look for in every window and token.
    """
    config = getattr(model, "active_peft_config", None) if hasattr(model, "get_base_model") else None
    if config is not None and getattr(config, "alora_invocation_tokens", None):
        raise TypeError(
            f"model has an adapter with alora_invocation_tokens={config.alora_invocation_tokens}, counted from the end "
            "of what a layer reads, which is one window here: leave them out"
        )
    if config is not None and config.is_prompt_learning:
        raise TypeError(
            f"model has a {type(config).__name__}, whose prompt is not in the model's layers: use LoRA, as "
            "sleep_lora_config sets it"
        )
