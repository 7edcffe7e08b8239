"""Answers of a model to a task's rows: asleep, and with the controls that say what a memory is worth."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch

from ..data import LongText, Task
from ..data.task import Row
from ..engine.slots import Block
from ..info import describe
from ..labels import IGNORED
from ..memory import Memory
from ..modeling import SleepForCausalLM
from ..training import SleepCollator
from ..training.evaluation import greedy_config

COLUMNS = ("input_ids", "attention_mask", "sleep_after")
CONTROLS = ("last_window", "full", "same_bytes")
Score = dict[str, Any]
Judged = list[list[tuple[int, bool]]]
"""Difficulty of each answer in each row, and whether it is right."""


def first_answer(row: Row) -> int:
    """Position of the first label."""
    return next(i for i, label in enumerate(row["labels"]) if label != IGNORED)


def last_window(row: Row, window_size: int, before: int = 0, sinks: int = 0) -> Row:
    """A row without what came before the window in which its first answer is asked for.

    Args:
        row: whole.
        window_size: L.
        before: of the tokens before that window, how many of the last stay.
        sinks: how many of the row's first tokens stay.
    """
    sleeps, start = row.get("sleep_after", [0] * len(row["input_ids"])), 0
    for i in range(first_answer(row)):
        if i == start + window_size or (i and sleeps[i - 1]):
            start = i
    start = max(0, start - before)
    if start <= sinks:
        return row
    return row | {name: [*row[name][:sinks], *row[name][start:]] for name in ("labels", *COLUMNS) if name in row}


def without_sleep(row: Row) -> Row:
    """A row that tells no one to sleep."""
    return {name: value for name, value in row.items() if name != "sleep_after"}


def problems(rows: Sequence[Row]) -> str:
    """Sixteen digits that tell rows from others: what runs must agree in to be compared answer by answer."""
    said = [[row["input_ids"], row["labels"]] for row in rows]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def batch_of(model: SleepForCausalLM, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Rows as one batch on the model's device, padded on the left."""
    batch = SleepCollator(padding_side="left")([{name: row[name] for name in COLUMNS if name in row} for row in rows])
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


@torch.no_grad()
def judge(model: SleepForCausalLM, task: Task, rows: Sequence[Row], batch_size: int) -> Judged:
    """Judge a model's answers: of a `LongText` what it generates, of another task the likeliest tokens.

    There an answer is right where each of its tokens has the largest logit after those before it: then, and only then,
    greedy generation says the same. Where rows have `choices`, ids of tokens, the largest among these. Rows do not
    depend on the others of their batch.
    """
    judge_some = _said if isinstance(task, LongText) else _predicted
    found: Judged = []
    for start in range(0, len(rows), batch_size):
        found += judge_some(model, task, rows[start : start + batch_size])
    return found


def _predicted(model: SleepForCausalLM, task: Task, rows: Sequence[Row]) -> Judged:
    keep = max(len(row["labels"]) - first_answer(row) + 1 for row in rows)
    logits = model(**batch_of(model, rows), use_cache=False, logits_to_keep=keep).logits
    found = []
    for row, mine in zip(rows, logits, strict=True):
        said = mine.argmax(-1)
        if "choices" in row:
            choices = torch.tensor(row["choices"], device=mine.device)
            said = choices[mine[:, choices].argmax(-1)]
        length = len(row["labels"])
        found.append(task.score(([0] * length + said.tolist())[-length:], row))
    return found


def _said(model: SleepForCausalLM, task: Any, rows: Sequence[Row]) -> Judged:
    batch = batch_of(model, [{name: row[name][: first_answer(row)] for name in COLUMNS if name in row} for row in rows])
    ids = greedy(model, batch, task.new_tokens)[:, batch["input_ids"].shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    found = []
    for row, tokens in zip(rows, ids, strict=True):
        said = task.tokenizer.decode(list(takewhile(lambda token: token not in ends, tokens)))
        found.append([(row["difficulty"], is_said) for is_said in task.judge(said, row)])
    return found


def greedy(model: SleepForCausalLM, batch: dict[str, torch.Tensor], new_tokens: int) -> torch.Tensor:
    """Generate greedily: `[B, T + new_tokens]` at most.

    What the base's own generation config asks for, a penalty on repetition for one, is not greedy, and is left out.
    """
    with greedy_config(model):
        return model.generate(**batch, max_new_tokens=new_tokens, do_sample=False)


def measure(
    model: SleepForCausalLM,
    task: Task,
    rows: Sequence[Row],
    sleep_passes: Sequence[int],
    batch_size: int = 8,
    controls: Sequence[str] = CONTROLS,
) -> list[Score]:
    """Ask a model about rows, at each N and with the controls, which are the same at any N.

    `all` reads everything, and sleeps on the way. `last_window` reads what stands in the window of the question alone,
    and before it as many tokens as the eviction keeps the KV of. `full` reads everything and never sleeps: with
    untrained blocks that is the base itself, of one that was pre-trained with loops in one of them. `same_bytes` is the
    base without what was injected; beside the window of the question it reads the tokens whose keys and values the
    eviction keeps, and as many before them as take the bytes of what was injected.

    Args:
        model: in eval mode.
        task: judges.
        rows: of the test split.
        sleep_passes: each N.
        batch_size: rows that are read at once.
        controls: some of `CONTROLS`; `same_bytes` needs weights that are not sharded.

    Raises:
        ValueError: a model in training mode, or a control that would read more than the base has positions for.

    Returns:
        By way of reading, difficulty and, where rows have one, mode: `accuracy`, `chance`, the number of answers `n`,
        and `right`, which has a digit for each, in order.
    """
    check_mode(model)
    judged: list[tuple[str, int, Judged]] = []
    for passes in sleep_passes:
        with model.sleeping(sleep_passes=passes):
            judged.append(("all", passes, judge(model, task, rows, batch_size)))
    judged += [(name, sleep_passes[-1], _control(name, model, task, rows, batch_size)) for name in controls]
    return [score for reads, passes, answers in judged for score in _scores(answers, task, rows, reads, passes)]


def _control(name: str, model: SleepForCausalLM, task: Task, rows: Sequence[Row], batch_size: int) -> Judged:
    read = read_by(name, model, rows)
    if name == "last_window" and not model.config.sleep.make_eviction().most_retained:
        return judge(model, task, read, batch_size)
    reader = model
    if name == "same_bytes":
        reader = SleepForCausalLM.from_base(model.lm, model.config.sleep, model.config.probed).eval()
        reader.generation_config = model.generation_config
    with reader.sleeping(window_size=max(model.config.sleep.window_size, longest(task, read))):
        return judge(reader, task, read, batch_size)


def read_by(control: str, model: SleepForCausalLM, rows: Sequence[Row]) -> list[Row]:
    """The part of rows that a control reads."""
    size, whole = model.config.sleep.window_size, max(len(row["input_ids"]) for row in rows)
    eviction = model.config.sleep.make_eviction()
    if control == "last_window":
        read = [last_window(row, size, eviction.recent, eviction.num_sink_tokens) for row in rows]
        return list(map(without_sleep, read)) if eviction.most_retained else read
    if control == "full":
        return [without_sleep(last_window(row, size, whole)) for row in rows]
    before = eviction.recent + same_bytes(model)
    return [without_sleep(last_window(row, size, before, eviction.num_sink_tokens)) for row in rows]


def longest(task: Task, rows: Sequence[Row]) -> int:
    """Most tokens that are read and generated for a row."""
    return max(len(row["input_ids"]) for row in rows) + getattr(task, "new_tokens", 0)


def same_bytes(model: SleepForCausalLM) -> int:
    """Tokens whose keys and values in the base take the bytes of the fast weights that were injected."""
    slots = [slot for slot in model._sleeper().order.slots if isinstance(slot, Block)]
    injected = Memory(carried=tuple(slot.empty(1, model.dtype) for slot in slots)).num_bytes()
    return injected // max(describe(model.config, dtype=model.dtype).kv_bytes_per_token, 1)


def check_mode(model: SleepForCausalLM) -> None:
    """Refuse a model in training mode."""
    if model.training:
        raise ValueError(
            "the model is in training mode, in which dropout would be measured too: call model.eval() first"
        )


def _scores(judged: Judged, task: Task, rows: Sequence[Row], reads: str, passes: int) -> list[Score]:
    groups: dict[tuple[Any, ...], str] = defaultdict(str)
    for row, answers in zip(rows, judged, strict=True):
        for difficulty, right in answers:
            groups[(difficulty, row["mode"]) if "mode" in row else (difficulty,)] += str(int(right))
    return [
        {
            "reads": reads,
            **({"mode": group[1]} if len(group) == 2 else {}),
            "difficulty": group[0],
            "N": passes,
            "accuracy": right.count("1") / len(right),
            "chance": task.chance(*group),
            "n": len(right),
            "right": right,
        }
        for group, right in sorted(groups.items())
    ]
