"""Differences between the steps of a training: N, the eviction style, and which parameters are trained."""

import inspect
import random
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..checks import require_int
from ..compat import CHECKPOINTING
from .parameters import fast_weight_names, kept_frozen, refuse_sharded

_CHANGES: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[ExitStack]]" = weakref.WeakKeyDictionary()
"""Changes that a model's callbacks have made for the step that runs, by model.

The callbacks share them: the last change must be taken back first, and a Trainer calls the first callback first.
"""


class DuringStep(TrainerCallback, ExportableState):
    """Changes the model for each optimizer step's forward and backward, and takes it back before anything else happens.

    So evaluation, logging and saved checkpoints see the model as it is configured. A subclass says what to change:

        class NowAndThen(DuringStep):
            def __init__(self, every, sleep_passes):
                self.every, self.sleep_passes = every, sleep_passes

            def change(self, state, model):
                return model.sleeping(sleep_passes=1 if state.global_step % self.every else self.sleep_passes)

    What it changes must follow from `state` alone, that is from the constructor's arguments and the step: then a
    resumed run continues as if it had never stopped. Checkpoints record these arguments, under the name of the class,
    and `SleepTrainer` refuses to resume with others. They must be attributes of the same names.
    """

    during_step = True
    _changes: ExitStack | None = None

    def change(self, state: Any, model: Any) -> AbstractContextManager:
        """Make what the step after `state.global_step` runs in: `model.sleeping(...)`, or any other context manager."""
        raise NotImplementedError

    def restore(self) -> None:
        """Take back all that is changed in the model: an interrupted step leaves it there."""
        if self._changes is not None:
            self._changes.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A checkpoint of a run without this callback has none, and the Trainer expects one when it saves.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.restore()
        shared = _CHANGES.get(model, lambda: None)() or ExitStack()
        _CHANGES[model], self._changes = weakref.ref(shared), shared
        shared.callback(self._forget)
        shared.enter_context(self.change(state, model))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    on_epoch_end = on_train_end = on_step_end

    def _forget(self) -> None:
        self._changes = None

    def state(self) -> dict[str, Any]:
        """Record the constructor's arguments, for checkpoints.

        Raises:
            TypeError: arguments that are no attributes.
        """
        names = list(inspect.signature(type(self)).parameters)
        if missing := [name for name in names if not hasattr(self, name)]:
            raise TypeError(
                f"{type(self).__name__}: checkpoints record the constructor's arguments, and {', '.join(missing)} "
                f"cannot be found: keep it as self.{missing[0]}"
            )
        # The mark is for a run that does not know the class.
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {"during_step": True}}


class SleepPassesSchedule(DuringStep):
    """Trains with another number of passes N than the config's, step by step.

    N of a step is a function of (arguments, step): the same on every rank, and after resuming.

    Args:
        first: N, throughout where nothing else is given.
        last: where N goes, or the most it can be.
        steps: optimizer steps in which N goes from `first` to `last`, each value for as long as the others.
        seed: draw N again for every optimizer step, from `first` to `last`, all equally likely.

    Raises:
        ValueError: arguments that do not fit together.

    Source: ours; N is fixed per run in Lee et al. 2026 (arXiv 2605.26099).
    """

    def __init__(self, first: int, last: int | None = None, steps: int | None = None, seed: int | None = None):
        for name, value in (("first", first), ("last", last), ("steps", steps)):
            if value is not None or name == "first":
                require_int(f"SleepPassesSchedule: {name}", value, 1)
        if (last is None) != (steps is None and seed is None) or (steps is not None and seed is not None):
            raise ValueError(
                f"SleepPassesSchedule: first={first}, last={last}, steps={steps}, seed={seed}: "
                "give first alone (fixed), with last and steps (linear), or with last and seed (drawn per step)"
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

    def change(self, state: Any, model: Any) -> AbstractContextManager:
        return model.sleeping(sleep_passes=self.passes(state.global_step))


class HardEvictionWarmup(DuringStep):
    """First trains the fast weights alone, with hard eviction, then everything, as configured.

    In the first stage all else is frozen. It has no gradients, so the optimizer neither decays it nor keeps a state of
    it until the first step of the second stage. The fast weights' state is kept through both. The learning-rate
    schedule knows of no stages. What was frozen before training stays frozen in both.

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
        """Tell whether the step after `state.global_step` belongs to the first stage."""
        return state.global_step < self.steps if self.steps is not None else state.epoch < self.epochs

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        refuse_sharded(model, "HardEvictionWarmup", "Train the two stages as two runs")
        unused = args.ddp_find_unused_parameters
        if args.world_size > 1 and (unused is False or (unused is None and getattr(args, CHECKPOINTING))):
            raise ValueError("HardEvictionWarmup on several ranks needs ddp_find_unused_parameters=True")
        if self.epochs is not None and args.ignore_data_skip:
            raise ValueError(
                f"HardEvictionWarmup: epochs={self.epochs} with ignore_data_skip=True: "
                "a resumed run would count its epochs from 0 again. Give the stage in steps"
            )
        names = fast_weight_names(model)
        if not any(p.requires_grad for name, p in model.named_parameters() if name in names):
            raise ValueError(
                "HardEvictionWarmup: all fast weights are frozen, and the first stage trains them alone: unfreeze some"
            )
        super().on_train_begin(args, state, control)

    @contextmanager
    def change(self, state: Any, model: Any) -> Iterator[None]:
        if not self.is_first_stage(state):
            yield
            return
        names = fast_weight_names(model)
        frozen = [p for name, p in model.named_parameters() if p.requires_grad and name not in names]
        with model.sleeping(eviction="hard"), kept_frozen(model, frozen):
            yield
