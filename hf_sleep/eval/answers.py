"""Answers of a model to a task's rows: asleep, and with the controls that say what a memory is worth."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import GenerationConfig

from ..data import LongText, Task
from ..data.task import Row
from ..info import describe
from ..labels import IGNORED
from ..modeling import SleepForCausalLM
from ..training import SleepCollator

COLUMNS = ("input_ids", "attention_mask", "sleep_after")
CONTROLS = ("last_window", "full", "same_bytes")
Score = dict[str, Any]
Judged = list[list[tuple[int, bool]]]
"""Difficulty of each answer in each row, and whether it is right."""


def first_answer(row: Row) -> int:
    """Position of the first label."""
    return next(i for i, label in enumerate(row["labels"]) if label != IGNORED)


def last_window(row: Row, window_size: int, before: int = 0) -> Row:
    """A row without what came before the window in which its first answer is asked for, but for `before` tokens."""
    sleeps, start = row.get("sleep_after", [0] * len(row["input_ids"])), 0
    for i in range(first_answer(row)):
        if i == start + window_size or (i and sleeps[i - 1]):
            start = i
    start = max(0, start - before)
    return row | {name: row[name][start:] for name in ("labels", *COLUMNS) if name in row}


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
    greedy generation says the same. Rows do not depend on the others of their batch.
    """
    judge_some = _said if isinstance(task, LongText) else _predicted
    found: Judged = []
    for start in range(0, len(rows), batch_size):
        found += judge_some(model, task, rows[start : start + batch_size])
    return found


def _predicted(model: SleepForCausalLM, task: Task, rows: Sequence[Row]) -> Judged:
    keep = max(len(row["labels"]) - first_answer(row) + 1 for row in rows)
    said = model(**batch_of(model, rows), use_cache=False, logits_to_keep=keep).logits.argmax(-1).tolist()
    width = [len(row["labels"]) for row in rows]
    return [task.score(([0] * n + ids)[-n:], row) for n, ids, row in zip(width, said, rows, strict=True)]


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
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    try:
        return model.generate(**batch, max_new_tokens=new_tokens, do_sample=False)
    finally:
        model.generation_config = own


def measure(
    model: SleepForCausalLM,
    task: Task,
    rows: Sequence[Row],
    sleep_passes: Sequence[int],
    batch_size: int = 8,
    controls: Sequence[str] = CONTROLS,
) -> list[Score]:
    """Ask a model about rows, at each N and with the controls, which are the same at any N.

    `all` reads everything, and sleeps on the way. `last_window` reads what stands in the window of the question alone.
    `full` reads everything and never sleeps: with untrained blocks that is the base itself. `same_bytes` is the base
    without what was injected; beside the window of the question it reads as many tokens before it as their keys and
    values take the bytes of the model's fast weights.

    Args:
        model: in eval mode.
        task: judges.
        rows: of the test split.
        sleep_passes: each N.
        batch_size: rows that are read at once.
        controls: some of `CONTROLS`; `same_bytes` needs weights that are not sharded.

    Returns:
        By way of reading, difficulty and, where rows have one, mode: `accuracy`, `chance`, the number of answers `n`,
        and `right`, which has a digit for each, in order.
    """
    judged: list[tuple[str, int, Judged]] = []
    for passes in sleep_passes:
        with model.sleeping(sleep_passes=passes):
            judged.append(("all", passes, judge(model, task, rows, batch_size)))
    judged += [(name, sleep_passes[-1], _control(name, model, task, rows, batch_size)) for name in controls]
    return [score for reads, passes, answers in judged for score in _scores(answers, task, rows, reads, passes)]


def _control(name: str, model: SleepForCausalLM, task: Task, rows: Sequence[Row], batch_size: int) -> Judged:
    size, longest = model.config.sleep.window_size, max(len(row["input_ids"]) for row in rows)
    if name == "last_window":
        return judge(model, task, [last_window(row, size) for row in rows], batch_size)
    reader, before = model, longest
    if name == "same_bytes":
        info = describe(model.config, dtype=model.dtype)
        before = info.fast_weight_bytes // max(info.kv_bytes_per_token, 1)
        reader = SleepForCausalLM.from_base(model.lm, model.config.sleep, model.config.probed).eval()
    rows = [without_sleep(last_window(row, size, before)) for row in rows]
    with reader.sleeping(window_size=max(size, longest + getattr(task, "new_tokens", 0))):
        return judge(reader, task, rows, batch_size)


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
