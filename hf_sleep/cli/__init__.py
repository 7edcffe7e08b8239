"""Command `hf-sleep`. Torch and transformers are imported where they are used: help needs neither."""

from . import bench, chat, env, generate, info, memory, retrofit, state, suggest  # noqa: F401 - each module adds its commands
from .app import app

__all__ = ["app"]
