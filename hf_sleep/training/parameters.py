"""Fast weights among a model's parameters: their names, freezing all others, and refusing sharded ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from ..modeling import SleepForCausalLM


def fast_weight_names(model: nn.Module) -> set[str]:
    """Names of the parameters that write and read fast weights.

    They are those of injected blocks, of what lies between passes, and of a hybrid's own linear mixers.

    Args:
        model: a `SleepForCausalLM`, or what wraps one.
    """
    sleeping = next(module for module in model.modules() if isinstance(module, SleepForCausalLM))
    names = sleeping.decoder.fast_weight_parameters()
    own = {id(parameter) for name, parameter in sleeping.lm.named_parameters() if name in names}
    return {
        name
        for name, parameter in model.named_parameters()
        if not {"fast_weights", "between"}.isdisjoint(name.split(".")) or id(parameter) in own
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


@contextmanager
def kept_frozen(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Keep parameters from being trained while it is open, which are trained before it and after it.

    PEFT trains every parameter of an adapter that is switched on again, as trainers do after they have read a reference
    with the adapter off. Such a switch of a `PeftModel` leaves them frozen here.
    """

    def freeze() -> None:
        for parameter in parameters:
            parameter.requires_grad_(False)

    wrapper: Any = model
    switches = [name for name in ("disable_adapter", "set_adapter") if hasattr(wrapper, "disable_adapter")]
    given = {name: getattr(wrapper, name) for name in switches}

    @contextmanager
    def disable_adapter(*args: Any, **kwargs: Any) -> Iterator[None]:
        try:
            with given["disable_adapter"](*args, **kwargs):
                yield
        finally:
            freeze()

    def set_adapter(*args: Any, **kwargs: Any) -> None:
        given["set_adapter"](*args, **kwargs)
        freeze()

    freeze()
    for name in switches:
        setattr(wrapper, name, {"disable_adapter": disable_adapter, "set_adapter": set_adapter}[name])
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for name in switches:
            vars(wrapper).pop(name, None)


def refuse_sharded(model: nn.Module, who: str, instead: str) -> None:
    """Raise a `ValueError` where the parameters are sharded over ranks."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(f"{who} does not work on sharded parameters (FSDP). {instead}")
