"""Measures the memory of a model in training: losses by window, time asleep, fast weights, gates and gradients."""

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainerCallback

from ..cache import SleepCache
from ..engine import PassEvent, SleepEvent
from ..labels import IGNORED, next_labels
from ..ops import gate_hook
from .evaluation import check_trainer
from .parameters import refuse_sharded
from .windows import window_numbers

KEPT = ("input_ids", "inputs_embeds", "attention_mask", "labels", "sleep_after")


class SleepMonitor(TrainerCallback):
    """Logs how the memory is doing, measured on a few rows of the last training batch.

    The rows are read once, without gradients, a window to a call, with the config's N and eviction. As in training, a
    row sleeps when its next token comes, so none sleeps on its last window.

    - `loss_window_1`, `loss_window_2`, ...: mean loss of the targets that the tokens of each row's first, second, ...
      window predict; left out where the model is not given the labels (with `label_smoothing_factor` or
      `compute_loss_func`);
    - `sleep_seconds`: spent in passes 2 to N and eviction, where rows that sleep together count once; `sleep_share`: of
      the whole read (forward only);
    - `fast_weight_norm`: Frobenius norm of a head's state after a row's last token; `fast_weight_rank`: its effective
      rank, exp of the entropy of its normalised singular values; means over rows, layers and heads;
    - `mean_decay`, `mean_beta`: α and β over all tokens and passes, of all layers with fast weights;
    - `fast_weight_norm_pass_1`, ..., `fast_weight_norm_pass_N`: Frobenius norm of a head's state after the n-th pass
      over a window that slept (the ordinary read is pass 1), mean over windows, looped layers and heads;
    - `change_pass_1`, ..., `change_pass_N`: norm of what the n-th pass made of a token in the looped layers, over the
      norm of what pass 1 read there, mean over the tokens of windows that slept; where what lies between two passes
      keeps what pass 1 read (`needs_loop_input`);
    - `gate_mean`, `gate_max`: mean and largest absolute value of `model.between.gate`, where there is one.

    And of the last training step, on this process:

    - `gradient_norm_pass_1`, ..., `gradient_norm_pass_N`: of the loss, with respect to the fast weights that the n-th
      pass left in the looped layers, over all windows that slept.

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
        self._watching: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        refuse_sharded(model, "SleepMonitor", "Leave it out")
        self.on_train_end(args, state, control)
        self._handles = [model.register_forward_pre_hook(self._keep_batch, with_kwargs=True)]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for handle in (*self._handles, *self._watching):
            handle.remove()

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._norms.clear()
        for handle in self._watching:
            handle.remove()
        # Only where the next log is measured: a pass that is watched runs layers that nobody else wants.
        is_next = (self._logs + 1) % self.every == 0
        self._watching = [model.register_pass_hook(self._watch)] if is_next else []

    def _watch(self, event: PassEvent) -> None:
        # A hook that held a state, or the event, would keep it, and its graph, forever.
        norms = self._norms.setdefault(event.number, [])

        def add(gradient: torch.Tensor) -> None:
            # Small gradients have no squares in float32, and Apple's GPUs no float64.
            largest = gradient.abs().amax()
            norms.append((gradient / largest.clamp(min=torch.finfo(largest.dtype).tiny)).norm() * largest)

        for state in event.written:
            if state.requires_grad:
                state.register_hook(add)

    def _keep_batch(self, module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        if module.training:
            given = inspect.signature(module.forward).bind_partial(*inputs).arguments | named
            self._batch = {name: None if given.get(name) is None else given[name].detach() for name in KEPT}

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
            with gates() as sums, pass_sums(model) as of_passes:
                metrics, cache = self._read(model)
        finally:
            model.train(was_training)
        norms, ranks = norms_and_ranks(fast_weights(cache))
        metrics |= {"fast_weight_norm": norms.mean().item(), "fast_weight_rank": ranks.mean().item()}
        gate = getattr(model.between, "gate", None)
        if isinstance(gate, nn.Parameter):
            metrics |= {"gate_mean": gate.mean().item(), "gate_max": gate.abs().max().item()}
        return metrics | {name: total / count for name, (total, count) in (sums | of_passes).items()}

    def _read(self, model: Any) -> tuple[dict[str, float], SleepCache]:
        """Losses by window and seconds, and what was remembered."""
        kept: dict[str, Any] = {name: None if t is None else t[: self.rows] for name, t in self._batch.items()}
        mask, marks, labels = kept["attention_mask"], kept["sleep_after"], kept["labels"]
        name = "inputs_embeds" if kept["input_ids"] is None else "input_ids"
        given = kept[name]
        shape, device = given.shape[:2], given.device
        real = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask != 0
        targets = torch.full(shape, IGNORED, device=device) if labels is None else next_labels(labels, real)
        row = torch.arange(len(given), device=device).unsqueeze(1)
        number = window_numbers(real, marks, model.config.sleep.window_size).masked_fill(~real, -1)
        metrics: dict[str, float] = {}
        cache, asleep, began = SleepCache(), 0.0, _now(device)
        for window in range(int(number.max()) + 1):
            mine = number == window
            columns = mine.long().argsort(dim=1, descending=True, stable=True)[:, : int(mine.sum(1).max())]
            read = {name: given[row, columns], "attention_mask": mine.gather(1, columns).long()}
            if marks is not None:
                read["sleep_after"] = marks.gather(1, columns) * read["attention_mask"]
            sleeps: list[SleepEvent] = []
            with model.on_sleep(sleeps.append):
                logits = model(**read, cache=cache).logits
            # Those who slept together share their seconds.
            asleep += sum({event.seconds for event in sleeps})
            wanted = targets.gather(1, columns).masked_fill(read["attention_mask"] == 0, IGNORED)
            if bool((wanted != IGNORED).any()):
                loss = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
                metrics[f"loss_window_{window + 1}"] = loss.item()
        return metrics | {"sleep_seconds": asleep, "sleep_share": asleep / (_now(device) - began)}, cache


def fast_weights(cache: SleepCache) -> list[torch.Tensor]:
    """List the fast weights `[B, H, K, V]` that a cache holds, per layer that has them."""
    layers: Any = cache.memory.carried
    return [layers[slot][0] for slot in sorted(cache.fast_slots)]


def norms_and_ranks(states: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Frobenius norm and effective rank of every head's state, over rows and layers; in float64, on the CPU.

    Source: effective rank, Roy & Vetterli 2007.
    """
    matrices = [state.flatten(0, 1).cpu().double() for state in states]
    spectra = [torch.linalg.svdvals(state) for state in matrices]
    shares = [s / s.sum(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny) for s in spectra]
    ranks = torch.cat([torch.special.entr(share).sum(-1).exp() for share in shares])
    return torch.cat([state.norm(dim=(-2, -1)) for state in matrices]), ranks


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


@contextmanager
def pass_sums(model: Any) -> Iterator[dict[str, list[float]]]:
    """Adds up, while it is open, what each pass over a window that sleeps left and changed: sum and count of each."""
    sums: dict[str, list[float]] = {}

    def add(name: str, values: torch.Tensor) -> None:
        total = sums.setdefault(name, [0.0, 0.0])
        total[0] += values.sum().item()
        total[1] += values.numel()

    def look(event: PassEvent) -> None:
        for state in event.written:
            add(f"fast_weight_norm_pass_{event.number}", state.norm(dim=(-2, -1)))
        if event.e is not None:
            change = event.z.float().norm(dim=-1) / event.e.float().norm(dim=-1)
            real = torch.arange(change.shape[1]) < torch.tensor(event.counts).unsqueeze(1)
            add(f"change_pass_{event.number}", change[real.to(change.device)])

    with model.register_pass_hook(look):
        yield sums


def _now(device: torch.device) -> float:
    """Seconds, when the device has done all it was asked."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
