"""The tests by their names: RULER's, facts, associative recall, and the tasks that a checkpoint was trained on."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compat import file_of
from ..data import MQAR, RULER, Depo, Facts, GSMInfinite, KHop, Managers, Rule110, Task
from ..data.task import Row
from ..modeling import SleepForCausalLM
from ..training.trainer import TASK_FILE, task_settings
from .answers import CONTROLS, Score, longest, measure, problems, read_by

PAIRS = (4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Size:
    """How long a test's text is, and for whom.

    Args:
        tokenizer: of the model.
        window_size: L, in tokens.
        windows: of text.
        vocab_size: of the model.
    """

    tokenizer: Any
    window_size: int
    windows: int
    vocab_size: int


def _words(kind: Callable[..., Task], **settings: Any) -> Callable[[Size], Sequence[Task]]:
    return lambda size: [kind(size.tokenizer, size.windows, size.window_size, **settings)]


def _pairs(size: Size) -> Sequence[Task]:
    # The first ids of a vocabulary are seldom words.
    first = min(1000, size.vocab_size // 8)
    ids = {"first_id": first, "vocab_size": min(first + 8192, size.vocab_size), "window_size": size.window_size}
    return [MQAR(pairs=pairs, **ids) for pairs in PAIRS if first + 1 + 2 * pairs <= ids["vocab_size"]]


TESTS: Mapping[str, Callable[[Size], Sequence[Task]]] = {
    **{name: _words(kind, **settings) for name, (kind, settings) in RULER.items()},
    "facts": _words(Facts),
    "mqar": _pairs,
}
"""What each test asks: RULER's by their names there. `mqar`, whose pairs are given, is as long as they are."""

AXES = {"niah": "windows ago", "vt": "hops", "cwe": "windows", "fwe": "windows", "facts": "facts", "mqar": "pairs"}
TASKS: Mapping[str, type[Task]] = {
    "gsm_infinite": GSMInfinite,
    "rule110": Rule110,
    "depo": Depo,
    "khop": KHop,
    "managers": Managers,
}
"""Tasks of the recipes, with settings of their own."""


def axis(test: str) -> str:
    """What the difficulty of a test counts."""
    return AXES.get(test.split("_")[0], "difficulty")


@dataclass(frozen=True)
class Result:
    """What one test found.

    Args:
        test: its name.
        settings: of its tasks.
        problems: what tells these problems from others.
        seconds: that it took.
        left_out: controls that were not measured, and why.
        scores: as `measure` returns them.
    """

    test: str
    settings: Sequence[Mapping[str, Any]]
    problems: Sequence[str]
    seconds: float
    left_out: Mapping[str, str]
    scores: Sequence[Score]


def run_test(
    model: SleepForCausalLM,
    test: str,
    tasks: Sequence[Task],
    sleep_passes: Sequence[int],
    rows: int = 50,
    batch_size: int = 8,
    seed: int = 1,
) -> Result:
    """Ask a model the problems of one test, at each N and with the controls of `measure`.

    Args:
        model: in eval mode.
        test: name for the result.
        tasks: whose problems are asked.
        sleep_passes: each N.
        rows: of each task.
        batch_size: rows that are read at once; they do not depend on each other.
        seed: of the rows.

    Raises:
        ValueError: a task with tokens that the model does not know.
    """
    began, vocabulary = time.perf_counter(), model.config.text_config.vocab_size
    asked = [(task, task.rows(seed, "test", range(rows))) for task in tasks]
    for task, mine in asked:
        if (largest := max(max(row["input_ids"]) for row in mine)) >= vocabulary:
            raise ValueError(f"{test}: {task} has token {largest}, and the model knows {vocabulary}")
    left_out = dict(_left_out(model, asked))
    controls = [name for name in CONTROLS if name not in left_out]
    scores = [score for task, mine in asked for score in measure(model, task, mine, sleep_passes, batch_size, controls)]
    settings, numbers = [task_settings(task) for task in tasks], [problems(mine) for _, mine in asked]
    return Result(test, settings, numbers, time.perf_counter() - began, left_out, scores)


def _left_out(model: SleepForCausalLM, asked: Sequence[tuple[Task, Sequence[Row]]]) -> Iterator[tuple[str, str]]:
    """Controls that cannot be measured, each with the reason."""
    most = getattr(model.config.text_config, "max_position_embeddings", None)
    for name in CONTROLS:
        length = max(longest(task, read_by(name, model, rows)) for task, rows in asked)
        if name == "same_bytes" and model.decoder.base_loops > 1:
            yield name, "the base was pre-trained with loops, and what sleeps runs it without"
        elif name == "same_bytes" and not model.fast_weights:
            yield name, "nothing was injected: the fast weights are the base's own"
        elif name != "last_window" and most is not None and length > most:
            yield name, f"it would read {length} tokens, and the base has {most} positions"


def other_windows(model: SleepForCausalLM, task: Task) -> str | None:
    """Say that a task means other parts of its text to be slept on than the model will sleep on, where it does."""
    size, own = model.config.sleep.window_size, getattr(task, "window_size", None)
    if own in (None, size):
        return None
    what = "more than one of them before the first sleep" if own < size else "less than one of them before a sleep"
    return f"its text comes in windows of {own} tokens, and the model, which sleeps after {size}, reads {what}"


def make_task(test: str, settings: Mapping[str, Any], size: Size | None = None) -> Task:
    """A task of the recipes by its name.

    Args:
        test: one of `TASKS`.
        settings: its fields as they come from JSON, without tuples.
        size: of tasks in words, which have its window and its tokenizer.

    Raises:
        ValueError: settings that it does not have, or that cannot work.
    """
    kind: Any = TASKS[test]
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := settings.keys() - known:
        raise ValueError(
            f"{kind.__name__} has no field {', '.join(sorted(unknown))}: it has {', '.join(sorted(known))}"
        )
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    if size is not None and "tokenizer" in known:
        given |= {"window_size": size.window_size, "tokenizer": size.tokenizer}
    return kind(**given)


def trained_on(model: str, revision: str | None = None) -> dict[str, Any]:
    """The task that a checkpoint of `SleepTrainer` carries: its class's name and its fields; empty where it has none.

    Args:
        model: folder or Hub id.
        revision: of it.
    """
    file = file_of(model, TASK_FILE, "gated_repo", "connection_errors", revision=revision)
    return {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def with_trained_settings(
    test: str, given: Mapping[str, Any], trained: Mapping[str, Any]
) -> tuple[dict[str, Any], Iterator[str]]:
    """The settings to ask a task of the recipes with: the checkpoint's, and those that were given instead.

    Returns:
        The settings, and in words where what is asked differs from what was trained.
    """
    kind = TASKS[test].__name__
    if not trained:
        return dict(given), iter(())
    if trained["task"] != kind:
        return dict(given), iter((f"the checkpoint was trained on {trained['task']}, and is evaluated on {kind}",))
    settings = {key: value for key, value in trained.items() if key != "task"}
    differing = [key for key in given.keys() & settings.keys() if given[key] != settings[key]]
    return settings | dict(given), (
        f"the checkpoint was trained with {key}={settings[key]}, and is evaluated with {given[key]}"
        for key in differing
    )
