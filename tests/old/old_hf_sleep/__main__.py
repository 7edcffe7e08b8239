"""`python -m hf_sleep`, the same as `hf-sleep`."""

from .cli import app

app(prog_name="hf-sleep")
