"""Stops a run before what is not finite is stepped on or saved."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from .parameters import refuse_sharded


class NonFiniteGuard(TrainerCallback):
    """Stops training when the loss, a gradient or a weight is not finite, before it is stepped on or saved.

    Every gradient is looked at where it is accumulated, since clipping by a NaN norm makes all of them NaN. Weights are
    looked at whenever a checkpoint may be written. It costs one read of every gradient per micro-batch, and one wait
    for the device per step. All ranks stop together.

    Raises:
        FloatingPointError: with the step, the first weight, or the first gradient in the backward pass, that is not
            finite, and the last checkpoint, which is sound.
        ValueError: on beginning to train, with fp16, whose loss scaling lives on such gradients, or sharded parameters.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        refuse_sharded(model, "NonFiniteGuard", "Leave it out")
        if args.fp16:
            raise ValueError("NonFiniteGuard: with fp16=True the loss scaler meets such gradients by itself: use bf16")
        self.on_train_end(args, state, control)
        self._finite: dict[str, torch.Tensor] = {}
        self._loss: list[torch.Tensor] = []
        self._handles = [model.register_forward_hook(self._keep_loss)]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._watch(name)))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for handle in getattr(self, "_handles", ()):
            handle.remove()

    def _keep_loss(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module.training and output.loss is not None:
            self._loss.append(output.loss.detach())

    def _watch(self, name: str) -> Callable[[torch.Tensor], None]:
        def look(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None  # it was just accumulated
            self._finite[name] = _all_finite(parameter.grad)

        return look

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._finite.clear()
        self._loss.clear()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        flags = [*self._finite.values(), *map(_all_finite, self._loss)]
        sound = torch.stack([flag.to(args.device) for flag in flags]).all().int()
        if dist.is_initialized():
            dist.all_reduce(sound, dist.ReduceOp.MIN)
        if not sound:
            broken = next((f"the gradient of {name}" for name, finite in self._finite.items() if not finite), None)
            loss = sum(loss.item() for loss in self._loss)
            broken = _broken_weight(model) or broken or "nothing on this rank"
            self._stop(args, state.global_step + 1, broken, f"the loss is {loss}; ")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # With save_strategy="best" it is the evaluation that decides.
        if (control.should_save or control.should_evaluate) and (weight := _broken_weight(model)):
            self._stop(args, state.global_step, weight)

    on_epoch_end = on_step_end

    def _stop(self, args: Any, step: int, broken: str, loss: str = "") -> None:
        good = get_last_checkpoint(args.output_dir) or "none was written"
        raise FloatingPointError(
            f"training stopped in step {step}: {loss}not finite first: {broken}. Last good checkpoint: {good}"
        )


def _all_finite(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.isfinite().all()


def _broken_weight(model: nn.Module) -> str | None:
    return next((f"the weight {name}" for name, p in model.named_parameters() if not _all_finite(p)), None)
