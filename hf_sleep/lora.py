"""The LoRA configuration that fits a sleeping model. Needs peft, which is imported when it is asked for."""

from typing import TYPE_CHECKING, Any

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
