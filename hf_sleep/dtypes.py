"""Floating dtypes that a machine multiplies in itself, and does not emulate."""

from typing import Any

import torch


def default_dtype(device: torch.device | str | int | None = None) -> torch.dtype:
    """The dtype to run a pretrained model in here: bfloat16 where the device multiplies in it, else float32.

    An NVIDIA GPU has bfloat16 from Ampere on, and every AMD GPU that torch runs on has it. A CPU has it with
    AVX512-BF16, AMX or Arm's BF16 and a torch with oneDNN. Without, a product takes many times what it takes in
    float32. Nothing was run on other devices (Apple's MPS, Intel's XPU): they get float32, which each of them has.

    float16 is never chosen: what was trained in bfloat16 overflows in it, and training in it needs a loss scaler.

    Args:
        device: where the model will compute; by default the accelerator, where there is one, else the CPU.

    Returns:
        `torch.bfloat16` or `torch.float32`.
    """
    device = _machine() if device is None else torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and _cpu_multiplies(torch.bfloat16)
    return torch.bfloat16 if native else torch.float32


def is_emulated(dtype: torch.dtype | None, device: torch.device) -> bool:
    """Tell whether products in a 16-bit `dtype` would be computed by a CPU that has none of that kind."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not _cpu_multiplies(dtype)


def emulated_dtype_of(x: torch.Tensor) -> torch.dtype | None:
    """The dtype of products with `x`, under autocast too, if its device is a CPU that has none of that kind."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype if is_emulated(dtype, x.device) else None


def dtype_to_load(config: Any, device_map: Any) -> torch.dtype | None:
    """float32 where the checkpoint's own dtype would be emulated; `None`: load it as it is.

    Args:
        config: of the checkpoint, with the dtype it was saved in.
        device_map: as `from_pretrained` takes it. Without one a model is loaded on the CPU and may be moved on.
    """
    on_cpu = str(device_map) == "cpu" or _machine().type == "cpu"
    if on_cpu and is_emulated(config.dtype, torch.device("cpu")):
        return torch.float32
    return None


def _machine() -> torch.device:
    """The accelerator, where there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """Tell whether this CPU has products of `dtype`, bfloat16 or float16, and oneDNN makes use of them."""
    if not torch.backends.mkldnn.is_available():
        return False
    has = torch.cpu.get_capabilities()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported() and any(map(has.get, ("avx512_fp16", "amx_fp16")))
    # oneDNN takes AVX-512 for enough and then converts, six times slower than with instructions for it.
    instructions = ("avx512_bf16", "amx_bf16", "bf16")  # the last is Arm's
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and any(map(has.get, instructions))
