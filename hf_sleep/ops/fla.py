"""The kernels of flash-linear-attention: whether they are there, and how they are called."""

import functools
import importlib.util
import os
import warnings

import torch
from packaging.version import Version
from torch import Tensor


def backend(device: torch.device | str) -> str:
    """Name what `gated_delta_rule` uses on `device`: `"fla"` (Triton kernels, for 16-bit values) or `"torch"`.

    fla's kernels refuse fp32, so fp32 and fp64 values are computed by torch everywhere. A GPU without fla works, but
    slowly, and says so once per process. Where a gradient is wanted, `has_backward` has a word too.
    """
    if torch.device(device).type != "cuda":
        return "torch"
    return "fla" if is_available() else "torch"


@functools.cache
def is_available() -> bool:
    """Tell whether fla and Triton are installed. The first call warns where they are not."""
    if importlib.util.find_spec("fla") is not None and importlib.util.find_spec("triton") is not None:
        return True
    warnings.warn(
        "hf_sleep runs the gated delta rule on the GPU with its slow torch fallback, because flash-linear-attention is "
        'not installed: pip install "hf-sleep[gpu]"',
        stacklevel=5,
    )
    return False


@functools.cache
def has_backward(device: torch.device) -> bool:
    """Tell whether fla's chunked kernels are right in backward on `device`; the first call warns where they are not.

    On NVIDIA's Hopper GPUs Triton 3.4 to 3.7.0 computes a wrong gradient. fla refuses it unless it may use tilelang,
    and torch's kernels take its place.

    Source: flash-linear-attention 0.6, `fla/ops/common/chunk_o.py`.
    """
    if torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] != 9:
        return True
    import triton

    if not (3, 4) <= Version(triton.__version__).release < (3, 7, 1):
        return True
    if importlib.util.find_spec("tilelang") is not None and os.environ.get("FLA_TILELANG") != "0":
        return True
    warnings.warn(
        f"hf_sleep trains the gated delta rule on this GPU with its slow torch fallback, because Triton "
        f"{triton.__version__} computes wrong gradients of flash-linear-attention's kernels on Hopper GPUs: install "
        "triton>=3.7.1, or tilelang",
        stacklevel=6,
    )
    return False


def wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def fla_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """A form of the gated delta rule (`delta_rule.Form`) for 16-bit values on a GPU."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    # fla's recurrent kernel has no backward.
    is_step = q.shape[1] == 1 and not wants_gradient(q, k, v, g, beta, state)
    kernel = fused_recurrent_gated_delta_rule if is_step else chunk_gated_delta_rule
    o, state = kernel(
        q=q.contiguous().to(v.dtype),
        k=k.contiguous().to(v.dtype),
        v=v.contiguous(),
        g=g.contiguous().float(),
        beta=beta.contiguous(),
        scale=q.shape[-1] ** -0.5,
        initial_state=state.float(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return o, state.float()
