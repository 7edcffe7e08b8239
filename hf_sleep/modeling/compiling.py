"""torch.compile and a model that sleeps."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)


def uncompiled(function: Callable) -> Callable:
    """Let torch.compile run `function` as it is, and say so once: how often layers run depends on what was read."""

    @functools.partial(torch.compiler.disable, reason="a model that sleeps is not compiled")
    def run(*args: Any, **kwargs: Any) -> Any:
        logger.warning_once("torch.compile leaves a model that sleeps as it is: it runs as it does without.")
        return function(*args, **kwargs)

    @functools.wraps(function)
    def choose(*args: Any, **kwargs: Any) -> Any:
        return (run if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return choose
