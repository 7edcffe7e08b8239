"""Command `hf-sleep`. Torch and transformers are imported where they are used: help needs neither."""

from ..serve.command import serve
from . import chat, generate, info, memory, suggest  # noqa: F401 - each module adds its commands
from .app import app
from .options import with_settings

app.command()(with_settings(serve))

__all__ = ["app"]
