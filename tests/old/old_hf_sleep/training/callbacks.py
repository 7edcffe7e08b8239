"""What changes during training, and what is watched: callbacks for `SleepTrainer` and the plain `Trainer` alike."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from ..cache import SleepCache
from ..compat import CHECKPOINTING
from ..ops import gate_hook
from .collator import IGNORED
from .evaluation import check_trainer


class DuringStep(TrainerCallback, ExportableState):
    """Changes the model for each optimizer step's forward and backward, and takes it back before anything else happens.

    So evaluation, logging and saved checkpoints see the model as it is configured. What it does follows from `state`
    alone, that is from the constructor's arguments and the step, so a resumed run goes on as if it had never stopped.
    """

    _undo: Callable[[], None] | None = None

    def change(self, state: Any, model: Any) -> Callable[[], None] | None:
        """Change `model` for the step after `state.global_step`; returns what takes it back."""
        raise NotImplementedError

    def restore(self) -> None:
        """Take the change back, if it is in place: an interrupted step leaves it there."""
        if self._undo is not None:
            self._undo()
        self._undo = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.restore()
        self._undo = self.change(state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    on_epoch_end = on_train_end = on_step_end


class SleepRecord(TrainerCallback, ExportableState):
    """Leaves the sleep settings in every checkpoint's trainer_state.json, for the check on resuming."""

    def __init__(self, model: Any = None):
        self.model = model

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.model = model  # restore_callback_states_from_checkpoint makes this object anew, from `state()`
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # the plain Trainer's has none

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"sleep": sleep_settings(self.model)}}


class TokensPerSecond(ProgressCallback):
    """The progress bar, with real tokens per second beside the steps, as they are logged."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and "train_tokens_per_second" in logs:
            self.training_bar.set_postfix_str(f"{logs['train_tokens_per_second']:,.0f} tokens/s", refresh=False)


def sleep_settings(model: Any) -> dict[str, Any]:
    """What a checkpoint must agree in with the run that goes on from it; empty for a model that does not sleep."""
    sleep = getattr(model.config, "sleep", None)
    return {} if sleep is None else {name: v for name, v in sleep.to_dict().items() if name != "version"}


class SleepPassesSchedule(DuringStep):
    """Trains with another number of passes N than the config's, step by step.

    N of a step is a function of (arguments, step): the same on every rank, and after resuming.

    Args:
        first: N, throughout where nothing else is given.
        last: where N goes, or the most it can be.
        steps: optimizer steps in which N goes from `first` to `last`, each value for as long as the others.
        seed: draw N anew for every optimizer step, from `first` to `last`, all equally likely.

    Raises:
        ValueError: arguments that do not fit together.

    Source: DESIGN decision; N is fixed per run in Lee et al. 2026 (arXiv 2605.26099).
    """

    def __init__(self, first: int, last: int | None = None, steps: int | None = None, seed: int | None = None):
        for name, value in (("first", first), ("last", last), ("steps", steps)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"SleepPassesSchedule: {name}={value!r} must be an integer of at least 1")
        if (last is None) != (steps is None and seed is None) or (steps is not None and seed is not None):
            raise ValueError(
                f"SleepPassesSchedule: first={first}, last={last}, steps={steps}, seed={seed}: give first alone "
                "(fixed), with last and steps (linear), or with last and seed (drawn per step)"
            )
        if seed is not None and last is not None and last < first:
            raise ValueError(f"SleepPassesSchedule: last={last} must be at least first={first} where N is drawn")
        self.first, self.last, self.steps, self.seed = first, last, steps, seed

    def passes(self, step: int) -> int:
        """N of the optimizer step that comes after `step` others."""
        if self.last is None:
            return self.first
        if self.steps is not None:
            return self.first + int((self.last - self.first) * min(step, self.steps) / self.steps)
        # A string seeds through SHA-512, so that neighbouring steps are unrelated.
        return random.Random(f"{self.seed}/{step}").randint(self.first, self.last)

    def change(self, state: Any, model: Any) -> Callable[[], None]:
        sleep = model.config.sleep
        configured, sleep.sleep_passes = sleep.sleep_passes, self.passes(state.global_step)
        return lambda: setattr(sleep, "sleep_passes", configured)

    def state(self) -> dict[str, Any]:
        names = ("first", "last", "steps", "seed")
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {}}


class HardEvictionWarmup(DuringStep):
    """First trains the fast weights alone, with hard eviction, then everything, as configured.

    In the first stage all else is frozen: it has no gradients, so the optimizer neither decays it nor keeps a state of
    it, and its first state is written in the first step of the second stage. The fast weights' state goes on through
    both. The learning-rate schedule knows of no stages. What was frozen before training stays frozen in both.

    Fast weights are the injected blocks and, in a hybrid, the mixers (not the MLPs) of its own linear-recurrent layers.

    Args:
        steps: optimizer steps of the first stage.
        epochs: instead of `steps`, epochs.

    Raises:
        ValueError: not exactly one of the two; on beginning to train, a model whose fast weights are frozen, or one
            wrapped such that parameters cannot be frozen for a while.

    Source: Lee et al. 2026 (arXiv 2605.26099), the sliding-window recipe: one epoch, then two.
    """

    def __init__(self, steps: int | None = None, epochs: float | None = None):
        length = steps if epochs is None else epochs
        if length is None or (steps is not None and epochs is not None) or length <= 0:
            raise ValueError(f"HardEvictionWarmup: steps={steps}, epochs={epochs}: give one of the two, above 0")
        self.steps, self.epochs = steps, epochs

    def is_first_stage(self, state: Any) -> bool:
        """Whether the step after `state.global_step` belongs to the first stage."""
        return state.global_step < self.steps if self.steps is not None else state.epoch < self.epochs

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        refuse_sharded(model, "HardEvictionWarmup", "Train the two stages as two runs")
        unused = args.ddp_find_unused_parameters
        if args.world_size > 1 and (unused is False or (unused is None and getattr(args, CHECKPOINTING))):
            raise ValueError("HardEvictionWarmup on several ranks needs ddp_find_unused_parameters=True")
        if self.epochs is not None and args.ignore_data_skip:
            raise ValueError(
                f"HardEvictionWarmup: epochs={self.epochs} with ignore_data_skip=True: a resumed run would count its "
                "epochs anew. Give the stage in steps"
            )
        names = fast_weight_names(model)
        if not any(p.requires_grad for name, p in model.named_parameters() if name in names):
            raise ValueError("HardEvictionWarmup: all fast weights are frozen, so the first stage has nothing to train")

    def change(self, state: Any, model: Any) -> Callable[[], None] | None:
        if not self.is_first_stage(state):
            return None
        sleep, names = model.config.sleep, fast_weight_names(model)
        frozen = [p for name, p in model.named_parameters() if p.requires_grad and name not in names]
        configured, sleep.eviction = sleep.eviction, "hard"
        for parameter in frozen:
            parameter.requires_grad_(False)

        def undo() -> None:
            sleep.eviction = configured
            for parameter in frozen:
                parameter.requires_grad_(True)

        return undo

    def state(self) -> dict[str, Any]:
        return {"args": {"steps": self.steps, "epochs": self.epochs}, "attributes": {}}


class NonFiniteGuard(TrainerCallback):
    """Stops training when the loss, a gradient or a weight is not finite, before it is stepped on or saved.

    Every gradient is looked at where it is accumulated, since clipping by a NaN norm makes all of them NaN; weights are
    looked at whenever a checkpoint may be written. One read of every gradient per micro-batch, one wait for the device
    per step. All ranks stop together.

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


class SleepMonitor(TrainerCallback):
    """Logs how the memory is doing, measured on a few rows of the last training batch.

    The rows are read without gradients, window by window, with the config's N and eviction: once for the gates, once
    for the rest. All sleep between two windows, so a row that ends before the others sleeps on its last window too.

    - `loss_window_1`, `loss_window_2`, ...: mean loss of the targets that each window's tokens predict;
    - `sleep_seconds`: spent in passes 2 to N and eviction; `sleep_share`: of the whole read (forward only);
    - `fast_weight_norm`: Frobenius norm of a head's state at the end; `fast_weight_rank`: its effective rank, exp of
      the entropy of its normalised singular values; means over rows, layers and heads;
    - `mean_decay`, `mean_beta`: α and β over all tokens and passes, of all layers with fast weights.

    And of the last training step, on this process:

    - `gradient_norm_pass_1`, ..., `gradient_norm_pass_N`: of the loss, with respect to the fast weights that the
      n-th pass left in the looped layers, over all windows that slept (the ordinary read is pass 1).

    Args:
        trainer: whose `log` reports it.
        every: measure at every so many of the Trainer's logging steps.
        rows: of the batch, at most.

    Raises:
        TypeError: without a trainer.

    Source: effective rank, Roy & Vetterli 2007; α and β, Lee et al. 2026 (arXiv 2605.26099), §2.
    """

    def __init__(self, trainer: Trainer | None = None, every: int = 10, rows: int = 4):
        self.trainer, self.every, self.rows = check_trainer(self, trainer), every, rows
        self._logs = 0
        self._batch: dict[str, Any] = {}
        self._norms: dict[int, list[torch.Tensor]] = {}
        self._handles: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        refuse_sharded(model, "SleepMonitor", "Leave it out")
        self.on_train_end(args, state, control)
        self._handles = [model.register_forward_pre_hook(self._keep_batch, with_kwargs=True)]
        self._handles.append(model.register_pass_hook(self._watch))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._norms.clear()

    def _watch(self, number: int, states: list[torch.Tensor]) -> None:
        norms = self._norms.setdefault(number, [])  # a hook that held a state would keep it, and its graph, for ever

        def add(gradient: torch.Tensor) -> None:
            # Small gradients have no squares in float32, and Apple's GPUs no float64.
            largest = gradient.abs().amax()
            norms.append((gradient / largest.clamp(min=torch.finfo(largest.dtype).tiny)).norm() * largest)

        for state in states:
            if state.requires_grad:
                state.register_hook(add)

    def _keep_batch(self, module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        if module.training:
            self._batch = {name: named.get(name) for name in ("input_ids", "attention_mask", "labels")}

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        self._logs += 1
        if self._logs % self.every == 0:
            gradients = {
                f"gradient_norm_pass_{n}": torch.stack([norm.cpu() for norm in norms]).double().norm().item()
                for n, norms in sorted(self._norms.items())
                if norms
            }
            with self.trainer.accelerator.autocast():
                self.trainer.log(self.measure(model) | gradients)

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, float]:
        """Measure `model` on the rows that were kept; leaves its mode as it was."""
        was_training = model.training
        model.eval()
        try:
            with gates() as sums:
                self._read(model)
            metrics, cache = self._read(model)
        finally:
            model.train(was_training)
        layers: Any = cache.tensors.layers
        states = [layers[slot][0].flatten(0, 1).cpu().double() for slot in sorted(cache.fast_slots)]
        norms = torch.cat([state.norm(dim=(-2, -1)) for state in states])
        spectra = [torch.linalg.svdvals(state) for state in states]
        shares = [s / s.sum(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny) for s in spectra]
        ranks = torch.cat([torch.special.entr(share).sum(-1).exp() for share in shares])
        metrics |= {"fast_weight_norm": norms.mean().item(), "fast_weight_rank": ranks.mean().item()}
        return metrics | {name: total / count for name, (total, count) in sums.items()}

    def _read(self, model: Any) -> tuple[dict[str, float], SleepCache]:
        ids, labels = self._batch["input_ids"][: self.rows], self._batch["labels"][: self.rows]
        mask = self._batch["attention_mask"]
        real = torch.ones_like(ids) if mask is None else (mask[: self.rows] != 0).long()
        order = real.argsort(dim=1, descending=True, stable=True)[:, : int(real.sum(1).max())]
        ids, real, labels = (t.gather(1, order) for t in (ids, real, labels))
        targets = F.pad(labels.masked_fill(real == 0, IGNORED)[:, 1:], (0, 1), value=IGNORED)
        size, cache, metrics = model.config.sleep.window_size, SleepCache(), {}
        awake = asleep = 0.0
        for number, start in enumerate(range(0, ids.shape[1], size)):
            window = slice(start, start + size)
            began = _now(ids.device)
            if number:
                model.sleep(cache)
            slept = _now(ids.device)
            output = model(input_ids=ids[:, window], attention_mask=real[:, window], cache=cache)
            asleep, awake = asleep + slept - began, awake + _now(ids.device) - slept
            if bool((targets[:, window] != IGNORED).any()):
                logits = output.logits.float().flatten(0, 1)
                loss = F.cross_entropy(logits, targets[:, window].flatten(), ignore_index=IGNORED)
                metrics[f"loss_window_{number + 1}"] = loss.item()
        return metrics | {"sleep_seconds": asleep, "sleep_share": asleep / (asleep + awake)}, cache


def fast_weight_names(model: nn.Module) -> set[str]:
    """Names of the parameters that write and read fast weights: injected blocks, and a hybrid's own linear mixers."""
    # A mixer is the module that holds the decay.
    mixers = tuple(name.removesuffix("A_log") for name, _ in model.named_parameters() if name.endswith(".A_log"))
    return {
        name for name, _ in model.named_parameters() if "fast_weights" in name.split(".") or name.startswith(mixers)
    }


def freeze_all_but_fast_weights(model: nn.Module) -> None:
    """Train the fast weights and nothing else: sets `requires_grad` of every parameter, in place.

    Fast weights are the injected blocks and a hybrid's own linear mixers, without their MLPs.

    Args:
        model: a `SleepForCausalLM`, or one wrapped by PEFT, of which an adapter is frozen too.

    Source: Lee et al. 2026 (arXiv 2605.26099), the first stage of the sliding-window recipe.
    """
    names = fast_weight_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def refuse_sharded(model: nn.Module, who: str, instead: str) -> None:
    """Raise a `ValueError` where the parameters are sharded over ranks."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(f"{who} does not work on sharded parameters (FSDP). {instead}")


@contextmanager
def gates() -> Iterator[dict[str, list[float]]]:
    """Adds up α and β of all real tokens while it is open: sum and count of each."""
    sums: dict[str, list[float]] = {}

    def look(g: torch.Tensor, beta: torch.Tensor, lengths: torch.Tensor | None) -> None:
        real = torch.ones(g.shape[:2], dtype=torch.bool, device=g.device)
        if lengths is not None:
            real = torch.arange(g.shape[1], device=g.device) < lengths.unsqueeze(1)
        for name, gate in (("mean_decay", g.exp()), ("mean_beta", beta)):
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += gate[real].sum().item()
            total[1] += gate[real].numel()

    with gate_hook(look):
        yield sums


def _now(device: torch.device) -> float:
    """Seconds, when the device has done all it was asked."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _all_finite(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.isfinite().all()


def _broken_weight(model: nn.Module) -> str | None:
    return next((f"the weight {name}" for name, p in model.named_parameters() if not _all_finite(p)), None)
