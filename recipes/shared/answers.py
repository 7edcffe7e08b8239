"""Answers of a model to a task's test rows: with sleep, from the last window alone, and with everything in context."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from hf_sleep import SleepForCausalLM
from hf_sleep.data.task import Row, Task
from hf_sleep.labels import IGNORED
from hf_sleep.training import SleepCollator, SleepTrainer

from .scores import Score

COLUMNS = ("input_ids", "attention_mask", "sleep_after")


def first_answer(row: Row) -> int:
    """Position of the first label."""
    return next(i for i, label in enumerate(row["labels"]) if label != IGNORED)


def last_window(row: Row, window_size: int) -> Row:
    """A row without what came before the window in which its first answer is asked for."""
    sleeps, start = row.get("sleep_after", [0] * len(row["input_ids"])), 0
    for i in range(first_answer(row)):
        if i == start + window_size or (i and sleeps[i - 1]):
            start = i
    return row | {name: row[name][start:] for name in ("labels", *COLUMNS) if name in row}


def without_sleep(row: Row) -> Row:
    """A row that tells no one to sleep."""
    return {name: value for name, value in row.items() if name != "sleep_after"}


def problems(rows: Sequence[Row]) -> str:
    """Sixteen digits that tell rows from others: what runs must agree in to be compared answer by answer."""
    said = [[row["input_ids"], row["labels"]] for row in rows]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


@torch.no_grad()
def judge(model: SleepForCausalLM, task: Task, rows: Sequence[Row], batch_size: int) -> list[list[tuple[int, bool]]]:
    """Difficulty of each answer in each row, and whether it is right.

    An answer is right where each of its tokens has the largest logit after those before it: then, and only then, greedy
    generation says the same.
    """
    collate, found = SleepCollator(padding_side="left"), []
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        batch = collate([{name: row[name] for name in COLUMNS if name in row} for row in some])
        keep = max(len(row["labels"]) - first_answer(row) + 1 for row in some)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        said = model(**batch, use_cache=False, logits_to_keep=keep).logits.argmax(-1).tolist()
        for row, ids in zip(some, said, strict=True):
            found.append(task.score(([0] * len(row["labels"]) + ids)[-len(row["labels"]) :], row))
    return found


def answer_scores(
    judged: list[list[tuple[int, bool]]], task: Task, rows: Sequence[Row], reads: str, passes: int
) -> list[Score]:
    """Scores by difficulty, and by mode where rows have one; `right` has a digit for each answer, in order."""
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


class Answers(TrainerCallback):
    """Judges the model's answers after each evaluation: each N, and the controls, which are the same at any N.

    `all` reads everything, and sleeps on the way. `last_window` reads what stands in the window of the question alone.
    `full` reads everything and never sleeps: with untrained blocks that is the base itself. All scores are added to the
    Trainer's history, and logged.

    Args:
        trainer: whose `log` reports it.
        task: judges.
        rows: of the test split.
        sleep_passes: each N.
        batch_size: rows that are read at once.
    """

    def __init__(
        self, trainer: SleepTrainer, task: Task, rows: Sequence[Row], sleep_passes: tuple[int, ...], batch_size: int
    ):
        self.trainer, self.task, self.rows = trainer, task, list(rows)
        self.sleep_passes, self.batch_size = sleep_passes, batch_size
        self.scores: list[Score] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with self.trainer.accelerator.autocast():
            self.scores = self.measure(model)
        state.log_history.append({"step": state.global_step, "answers": self.scores})
        self.trainer.log(
            {
                "_".join(["eval", score["reads"], *([score["mode"]] if "mode" in score else [])])
                + f"_{score['difficulty']}_passes_{score['N']}": score["accuracy"]
                for score in self.scores
            }
        )

    def measure(self, model: SleepForCausalLM) -> list[Score]:
        own, longest = model.config.sleep, max(len(row["input_ids"]) for row in self.rows)
        ends = [last_window(row, own.window_size) for row in self.rows]
        scores = []
        for passes in self.sleep_passes:
            with model.sleeping(sleep_passes=passes):
                scores += self._score(model, self.rows, "all", passes)
        scores += self._score(model, ends, "last_window", self.sleep_passes[-1])
        with model.sleeping(window_size=max(longest, own.window_size)):
            return scores + self._score(model, [without_sleep(row) for row in self.rows], "full", self.sleep_passes[-1])

    def _score(self, model: SleepForCausalLM, rows: list[Row], reads: str, passes: int) -> list[Score]:
        return answer_scores(judge(model, self.task, rows, self.batch_size), self.task, rows, reads, passes)
