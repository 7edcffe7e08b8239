"""A digest of weights that sees every value."""

import hashlib

import torch
from torch import nn

from .placement import loaded

LANES = 2**18  # of four values each, at a time
SMALLEST = 2.0**-13  # what float16 rounds more finely than bfloat16; below it float16 soon loses what bfloat16 keeps


def checksum(model: nn.Module) -> str:
    """Hex digest of a model's parameters: names, shapes, and all values above `SMALLEST` as bfloat16.

    The same weights give the same digest in any floating dtype and on any device, as far as that dtype holds bfloat16.
    Of quantised and sharded parameters it sees names and shapes.
    """
    digest = hashlib.sha256()
    odd: dict[torch.device, torch.Tensor] = {}
    for name, module in sorted(model.named_modules()):
        with loaded(module):
            for key, parameter in sorted(module.named_parameters(recurse=False)):
                digest.update(f"{name}.{key}{tuple(parameter.shape)}".encode())
                t = parameter.detach()
                if type(t) is torch.Tensor and t.is_floating_point():
                    if t.device not in odd:
                        odd[t.device] = _odd_numbers(t.device)
                    numbers = odd[t.device]
                    digest.update(str([_sum(part, numbers) for part in t.flatten().split(4 * LANES)]).encode())
    return digest.hexdigest()


def _odd_numbers(device: torch.device) -> torch.Tensor:
    """One for each lane, `[LANES]`, int64."""
    return torch.arange(LANES, dtype=torch.int64, device=device) * 0x1E3779B97F4A7C16 + 0x3F58476D1CE4E5B9


def _sum(values: torch.Tensor, numbers: torch.Tensor) -> int:
    """Sum of values' bits, four at a time, each times a number of its own, modulo 2**64: the same in any order."""
    bits = nn.functional.hardshrink(values.to(torch.bfloat16), SMALLEST)
    lanes = nn.functional.pad(bits, (0, -len(bits) % 4)).view(torch.int64)
    return int((lanes * numbers[: len(lanes)]).sum())
