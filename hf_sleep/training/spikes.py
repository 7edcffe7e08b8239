"""Skips steps whose gradient norm stands out, which clipping does not bound where Muon steps."""

import math
import statistics
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..checks import require_int
from .evaluation import check_trainer

logger = logging.get_logger(__name__)
STATE = "spike_guard"


class SpikeGuard(TrainerCallback):
    """Skips optimizer steps whose gradient norm is many times its running median, and says so.

    Muon's update is as large for a huge gradient as for a small one, and clipping only makes the gradient smaller. So a
    step that points anywhere moves the weights as far as every other. A skipped step leaves the weights and the
    optimizer's state bit for bit as they were. It counts as a step: the learning-rate schedule goes past it, and its
    batch is not read again.

    The norm is the one that the Trainer logs as `grad_norm`: before clipping, of all micro-batches, over all ranks. The
    median is that of the last `window` steps that were taken. A skipped norm never enters it, and nothing is judged
    before there are so many. Where others are trained (`HardEvictionWarmup`), their norms have a median of their own. A
    norm that is not finite is skipped from the first step on. All ranks skip together.
    Checkpoints keep the norms: a resumed run continues with the same median.

    `skipped_steps`, their number so far, is logged with the loss after it has changed.

    Args:
        trainer: whose `log` reports it.
        factor: how many times the median is too much, above 1.
        window: norms that the median is of, in steps.
        max_skips: so many in a row stop the run: that is no spike any more.

    Raises:
        TypeError: without a trainer.
        ValueError: arguments that cannot work; on beginning to train, fp16, whose loss scaler skips steps by itself, or
            DeepSpeed, which keeps the gradients to itself.
        RuntimeError: `max_skips` steps in a row would have been skipped, with their norm and the median.

    Source: ours; Jordan et al. 2024 (Muon), for an update that does not shrink with the gradient.
    """

    def __init__(self, trainer: Trainer | None = None, factor: float = 10.0, window: int = 50, max_skips: int = 10):
        self.trainer = check_trainer(self, trainer)
        if not (math.isfinite(factor) and factor > 1):
            raise ValueError(f"SpikeGuard: factor={factor!r} must be finite and above 1")
        require_int("SpikeGuard: window", window, 1)
        require_int("SpikeGuard: max_skips", max_skips, 1)
        self.factor, self.window, self.max_skips = factor, window, max_skips
        self._watched: Any = None
        self._norm: torch.Tensor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fp16:
            raise ValueError("SpikeGuard: with fp16=True the loss scaler skips steps by itself: use bf16")
        if self.trainer.is_deepspeed_enabled:
            raise ValueError("SpikeGuard: DeepSpeed keeps the gradients to itself, and clips and steps on its own")
        self.on_train_end(args, state, control)
        self._watch(self.trainer.accelerator)
        # Not as an ExportableState: restored as one it would be built from its arguments, and have no trainer.
        fresh = {"args": {}, "attributes": {"norms": {}, "skipped": 0, "in_a_row": 0}}
        self._kept = state.stateful_callbacks.setdefault(STATE, fresh)["attributes"]
        kept = self._kept["norms"]
        kept = kept if isinstance(kept, dict) else {"": kept}  # older checkpoints have one row of them
        self._norms = {trained: deque(norms, self.window) for trained, norms in kept.items()}
        self._logged = self._kept["skipped"]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._watched is not None:
            vars(self._watched).pop("clip_grad_norm_", None)
            self._watched = None

    def _watch(self, accelerator: Any) -> None:
        """Keep the norm that the Trainer takes: it keeps it to itself, and its callbacks come after clipping."""
        clip = accelerator.clip_grad_norm_

        def look(*args: Any, **kwargs: Any) -> Any:
            self._norm = clip(*args, **kwargs)
            return self._norm

        self._watched, accelerator.clip_grad_norm_ = accelerator, look

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        norm, median = self._take_norm(), math.inf
        norms = self._norms_of(model)
        if len(norms) == self.window:
            median = statistics.median(norms)
        if not self._is_spike_anywhere(norm, median, args.device):
            norms.append(norm)
            self._kept.update(norms={of: list(each) for of, each in self._norms.items()}, in_a_row=0)
            return
        step, found = state.global_step + 1, f"its gradient norm is {norm:.3g}"
        if math.isfinite(median):
            found += f", the running median (window={self.window}) {median:.3g}"
        self._kept.update(skipped=self._kept["skipped"] + 1, in_a_row=self._kept["in_a_row"] + 1)
        if self._kept["in_a_row"] == self.max_skips:
            good = get_last_checkpoint(args.output_dir) or "none was written"
            raise RuntimeError(
                f"SpikeGuard: step {step} would be skipped, the last of {self.max_skips} in a row: {found}. Either the "
                "weights went wrong before: continue from an earlier checkpoint with lower learning rates. Or such "
                f"norms are right for what is trained on now: raise factor={self.factor:g}. Last checkpoint: {good}"
            )
        if state.is_world_process_zero:
            logger.warning(f"SpikeGuard: step {step} is skipped: {found}")
        for parameter in model.parameters():
            parameter.grad = None  # a zero would still be stepped on, with momentum and weight decay

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs and self._logged != self._kept["skipped"]:
            self._logged = self._kept["skipped"]
            self.trainer.log({"skipped_steps": self._logged})

    def _norms_of(self, model: Any) -> deque[float]:
        """The last norms of steps in which as many parameters were trained as now."""
        trained = str(sum(p.numel() for p in model.parameters() if p.requires_grad))
        return self._norms.setdefault(trained, self._norms.pop("", deque(maxlen=self.window)))

    def _take_norm(self) -> float:
        """The norm of this step, which is waited for."""
        norm, self._norm = self._norm, None
        if norm is None:
            raise RuntimeError("SpikeGuard: this Trainer has taken no gradient norm: it must use its accelerator's")
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _is_spike_anywhere(self, norm: float, median: float, device: torch.device) -> bool:
        is_spike = torch.tensor(int(not math.isfinite(norm) or norm > self.factor * median), device=device)
        if dist.is_initialized():
            dist.all_reduce(is_spike, dist.ReduceOp.MAX)
        return bool(is_spike)
