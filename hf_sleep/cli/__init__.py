"""Command `hf-sleep`. Torch and transformers are imported where they are used: help needs neither."""

# Each module adds its commands.
from . import bench, chat, env, evaluate, generate, info, memory, retrofit, serve, state, suggest  # noqa: F401
from .app import app

__all__ = ["app"]
