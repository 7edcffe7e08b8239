"""Command `hf-sleep`. Torch and transformers are imported where they are used: help needs neither."""

from . import chat, generate, info, memory, suggest  # noqa: F401 - each module adds its commands
from .app import app

__all__ = ["app"]
