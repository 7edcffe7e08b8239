"""Reading weights that accelerate keeps off their device until their module is called."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


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
