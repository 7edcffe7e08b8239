"""Places of weights that are not here: off their device, or a part on each rank; and what ranks must agree on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor


def compute_device(module: nn.Module) -> torch.device:
    """Find the device on which a module computes, also when accelerate keeps its weights elsewhere."""
    device = _of_hook(module)
    if device is None and (here := next(module.parameters()).device).type != "meta":
        return here
    # accelerate's cpu_offload hooks the modules that hold weights, and none of those around them.
    of_parts = (found for part in module.modules() if (found := _of_hook(part)) is not None)
    return torch.device(next(of_parts, "meta") if device is None else device)


def _of_hook(module: nn.Module) -> Any:
    """The device on which accelerate lets a module compute; `None` where it says none."""
    return getattr(getattr(module, "_hf_hook", None), "execution_device", None)


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Bring the parameters that `module` itself holds to where it computes, though it is not called."""
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def without_views(pair: Any) -> Any:
    """A pair of tensors, neither of them a view: FSDP2 warns of views that a module returns, which it cannot watch."""
    return type(pair)(*(t.clone() if t._is_view() else t for t in pair))


def as_forward(module: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function(*arguments)`, with the weights of `module` gathered as FSDP2 gathers them for its forward.

    Args:
        module: runs as it is where it is not sharded.
        function: a layer's `[B, T, C]` and a pair of tensors in, the same out. A gradient must come back through what
            FSDP2 saw, so all that later code uses has to be among what it returns.
        arguments: for `function`.
    """
    if not isinstance(module, FSDPModule):
        return function(*arguments)

    def own(*arguments: Any) -> Any:
        x, pair = function(*arguments)
        return x, without_views(pair)

    holder: Any = module
    holder._as_forward = own
    register_fsdp_forward_method(module, "_as_forward")
    run = holder._as_forward
    del holder._as_forward
    return run(*arguments)


def is_sharded(model: nn.Module) -> bool:
    """Tell whether ranks hold a part of the weights each (FSDP2)."""
    return dist.is_initialized() and any(isinstance(module, FSDPModule) for module in model.modules())


def largest_of_ranks(number: int, device: torch.device) -> int:
    """The largest of every rank's `number`."""
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def is_known_zero(parameter: torch.Tensor) -> bool:
    """Tell whether all values are zero; of a sharded one, this rank's part, as not all ranks may ask."""
    here = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return not here.is_meta and here.numel() > 0 and not bool(here.any())


def check_whole(model: nn.Module) -> None:
    """Check that a forward finds the parameters that it needs.

    Raises:
        ValueError: a copy without parameters (nn.DataParallel), or DeepSpeed ZeRO-3.
    """
    first = next(model.parameters(), None)
    if first is None:
        raise ValueError(
            "nn.DataParallel, in which Trainer wraps a model on a machine with several GPUs, makes copies without "
            "parameters of their own: start one process per GPU, with torchrun or accelerate launch (DDP, FSDP2)"
        )
    if hasattr(first, "ds_id"):
        raise ValueError(
            "DeepSpeed ZeRO-3 gathers a module's weights where all ranks call it, and ranks whose rows have other "
            "numbers of windows would wait for each other for ever. Use FSDP2 (recipes/accelerate/fsdp2.yaml), where "
            "they agree on the number, or ZeRO-2"
        )


def lengths_in_step(longest: int, device: torch.device, depends_on_data: bool, has_marks: bool = False) -> int:
    """Agree on how many tokens a row of each rank reads, where ranks gather each other's weights.

    They must all run the same modules in the same order: as many windows, every one of them to the end. What is read
    after a row's end has no target, and nothing looks back at it.

    Args:
        longest: tokens of this rank's longest row.
        device: of the exchange.
        depends_on_data: whether the number of passes does.
        has_marks: whether the rows say where they sleep.

    Raises:
        ValueError: either, so ranks would disagree.
    """
    if has_marks:
        raise ValueError(
            "sleep_after with sharded weights (FSDP): every rank has to sleep as often as the others. Leave it out, or "
            "train with DDP"
        )
    if depends_on_data:
        raise ValueError(
            "sleep_passes is a policy that looks at the data, and with sharded weights (FSDP) every rank has to run as "
            "many passes as the others: use a number"
        )
    return largest_of_ranks(longest, device)
