"""Which parameters are fast weights, and where they are."""

from torch import nn
from torch.distributed.tensor import DTensor


def fast_weight_names(model: nn.Module) -> set[str]:
    """Names of the parameters that write and read fast weights: injected blocks, and a hybrid's own linear mixers."""
    # A mixer is the module that holds the decay.
    mixers = tuple(name.removesuffix("A_log") for name, _ in model.named_parameters() if name.endswith(".A_log"))
    return {
        name for name, _ in model.named_parameters() if "fast_weights" in name.split(".") or name.startswith(mixers)
    }


def freeze_all_but_fast_weights(model: nn.Module) -> None:
    """Train the fast weights and nothing else: sets `requires_grad` of every parameter, in place.

    Fast weights are the injected blocks and a hybrid's own linear mixers, without their MLPs.

    Args:
        model: a `SleepForCausalLM`, or one wrapped by PEFT, of which an adapter is frozen too.

    Source: Lee et al. 2026 (arXiv 2605.26099), the first stage of the sliding-window recipe.
    """
    names = fast_weight_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def refuse_sharded(model: nn.Module, who: str, instead: str) -> None:
    """Raise a `ValueError` where the parameters are sharded over ranks."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(f"{who} does not work on sharded parameters (FSDP). {instead}")
