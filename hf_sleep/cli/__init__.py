"""Command `hf-sleep`. Torch and transformers are imported where they are used: help needs neither."""

from ..serve.command import serve

# Each module adds its commands.
from . import bench, chat, env, generate, info, memory, retrofit, state, suggest  # noqa: F401
from .app import app
from .options import with_settings

app.command()(with_settings(serve))

__all__ = ["app"]
