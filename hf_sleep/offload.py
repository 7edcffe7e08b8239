"""Reading weights that accelerate keeps off their device until their module is called."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


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
