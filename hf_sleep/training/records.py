"""Records in a checkpoint of the run that wrote it, and the check that another run may continue from it."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from ..config import BEFORE
from .schedules import DuringStep


class SleepRecord(TrainerCallback, ExportableState):
    """Leaves the sleep settings in every checkpoint's trainer_state.json, for the check on resuming."""

    def __init__(self, model: Any = None):
        self.model = model

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.model = model  # restore_callback_states_from_checkpoint makes another such object, from `state()`
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # the plain Trainer's has none

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"sleep": sleep_settings(self.model)}}


def sleep_settings(model: Any) -> dict[str, Any]:
    """Settings in which a checkpoint and the run that continues it must agree; empty for a model without sleep."""
    sleep = getattr(model.config, "sleep", None)
    return {} if sleep is None else {name: v for name, v in sleep.to_dict().items() if name != "version"}


def check_same_run(folder: Path, model: Any, schedules: Iterable[DuringStep]) -> None:
    """Check that a checkpoint was written by a run that slept, and changed during training, as this one does.

    Args:
        folder: the checkpoint.
        model: what is to be trained.
        schedules: what this run changes step by step.

    Raises:
        ValueError: naming what differs, and both values.
    """
    config, state = folder / "config.json", folder / "trainer_state.json"
    written = TrainerState.load_from_json(str(state)).stateful_callbacks if state.is_file() else {}
    saved = json.loads(config.read_text(encoding="utf-8")).get("sleep", {}) if config.is_file() else {}
    if "SleepRecord" in written:  # an adapter's checkpoint has no config.json
        saved |= written["SleepRecord"]["attributes"]["sleep"]
    if saved:  # half-lives are of first values alone
        saved = {name: value for name, value in BEFORE.items() if name != "block_half_lives"} | saved
    for name, value in sleep_settings(model).items():
        if saved.get(name, value) != value:
            raise ValueError(
                f"{folder} was trained with sleep.{name}={saved[name]!r}, this model has {value!r}: "
                "build the model as that run did, or start a new run from the checkpoint's weights"
            )
    if not written:
        return
    ours: dict[str, list[Any]] = {}
    for schedule in schedules:
        ours.setdefault(type(schedule).__name__, []).append(schedule.state())
    known = {*ours, *(kind.__name__ for kind in _subclasses(DuringStep))}
    theirs = {name: entry if isinstance(entry, list) else [entry] for name, entry in written.items()}
    theirs = {name: states for name, states in theirs.items() if name in known or any(map(_is_marked, states))}
    if _arguments(theirs) != _arguments(ours):
        then, now = (_arguments(states) for states in (theirs, ours))
        raise ValueError(
            f"{folder} was trained with {then or 'no schedule'}, this run has {now or 'none'}: "
            "pass the same callbacks to continue, or start a new run from the checkpoint's weights"
        )


def _subclasses(kind: type[DuringStep]) -> Iterator[type[DuringStep]]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def _is_marked(state: dict[str, Any]) -> bool:
    """Tell whether a state is of a `DuringStep`, whose class may not be imported here."""
    return state.get("attributes", {}).get("during_step", False)


def _arguments(states: dict[str, list[Any]]) -> dict[str, Any]:
    """The arguments of each class's callbacks, as JSON has them; of several callbacks of a class those that differ.

    The Trainer writes such states again with every checkpoint, after those that it has read.
    """
    plain: dict[str, Any] = {}
    for name, found in states.items():
        texts = sorted({json.dumps(state["args"], sort_keys=True) for state in found})
        plain[name] = json.loads(texts[0]) if len(texts) == 1 else [json.loads(text) for text in texts]
    return plain
