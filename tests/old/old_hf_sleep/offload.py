"""Reading weights that are elsewhere until their module is called: off their device, or on all ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method


def compute_device(module: nn.Module) -> torch.device:
    """Where a module computes, also when accelerate keeps its weights elsewhere."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if device is None else torch.device(device)


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Within it, the parameters that `module` itself holds are where it computes, though it is not called."""
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def as_forward(module: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, with the weights of `module` gathered around it as FSDP2 gathers them around its forward.

    Args:
        module: runs as it is where it is not sharded.
        function: a layer's `[B, T, C]` and a pair of tensors in, the same out. A gradient must come back through what
            FSDP2 saw, so all that later code uses has to be among what it returns.
        arguments: for `function`.
    """
    if not isinstance(module, FSDPModule):
        return function(*arguments)

    def without_views(*arguments: Any) -> Any:
        # FSDP2 warns of views, which it cannot watch.
        x, pair = function(*arguments)
        return x, tuple(t.clone() if t._is_view() else t for t in pair)

    holder: Any = module
    holder._as_forward = without_views
    register_fsdp_forward_method(module, "_as_forward")
    run = holder._as_forward
    del holder._as_forward
    return run(*arguments)
