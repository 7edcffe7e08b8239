"""`hf-sleep env`: what a report of a bug needs."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..version import __version__
from .app import app
from .options import Json
from .show import as_json, console, facts, short

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "peft", "trl", "flash-linear-attention")
MORE_PACKAGES = ("flash-attn", "triton")


@app.command()
def env(*, json: Json = False) -> None:
    """Show versions, machine and kernels: paste it into a report of a bug."""
    found = environment()
    if json:
        as_json(found)
        return
    rows = facts()
    for name, value in found.items():
        rows.add_row(name, ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value))
    console().print(rows)


def environment() -> dict[str, Any]:
    """What this machine and this Python are, JSON-ready."""
    import torch

    from ..dtypes import default_dtype
    from ..ops import backend

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return {
        "hf_sleep": __version__,
        **{name: _version(name) for name in (*PACKAGES, *MORE_PACKAGES)},
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "CUDA": torch.version.cuda or "none",
        "cards": [_card(i) for i in range(torch.cuda.device_count())],
        "default device": str(device),
        "default dtype": str(default_dtype()).removeprefix("torch."),
        "kernels": backend(device),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _card(index: int) -> str:
    import torch

    facts = torch.cuda.get_device_properties(index)
    return f"{facts.name} ({short(facts.total_memory, 'B')}, compute {facts.major}.{facts.minor})"
