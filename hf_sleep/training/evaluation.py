"""Judging answers: teacher-forced for `SleepTrainer.evaluate`, and through `generate` as a callback."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import datasets
from transformers import EvalPrediction, GenerationConfig, Trainer, TrainerCallback

from ..data import Task
from ..labels import IGNORED
from ..lora import refuse_prompts
from .collator import SleepCollator

IN_ORDER = {
    "dataloader_drop_last": False,
    "dataloader_in_order": True,
    "batch_eval_metrics": False,
    "eval_do_concat_batches": True,
}
"""Arguments with which a Trainer hands all rows' predictions over at once, in the order of the rows."""


def accuracy_by_difficulty(rows: Any, task: Task | None, predictions: EvalPrediction) -> dict[str, float]:
    """Exact-match accuracy of greedy predictions, teacher-forced.

    Args:
        rows: what was evaluated, in that order; their labels may be padded on either side in `predictions`.
        task: judges them. `None`: all labels of a row are one answer, of the row's `difficulty`.
        predictions: predicted ids and labels, `[rows, T]`, `IGNORED` where there are none.

    Returns:
        `accuracy_{difficulty}`, their mean `accuracy`, and with `task` the same of `chance`.

    Raises:
        ValueError: labels that are not those of `rows`.
    """
    right: dict[int, list[bool]] = defaultdict(list)
    for row, predicted, labels in zip(rows, predictions.predictions, predictions.label_ids, strict=True):
        where = (labels != IGNORED).nonzero()[0]
        asked = [i for i, label in enumerate(row["labels"]) if i and label != IGNORED]
        said = predicted[where - 1].tolist()
        if 0 in where or [row["labels"][i] for i in asked] != labels[where].tolist():
            raise ValueError(
                "the labels that were evaluated are not those of the dataset's rows: the collator may not change them"
            )
        if task is None:
            right[row["difficulty"]].append(said == labels[where].tolist())
            continue
        guess = [0] * len(row["labels"])
        for i, token in zip(asked, said, strict=True):
            guess[i - 1] = token
        for difficulty, hit in task.score(guess, row):
            right[difficulty].append(hit)
    scores = {"accuracy": {difficulty: sum(hits) / len(hits) for difficulty, hits in sorted(right.items())}}
    if task is not None:
        scores["chance"] = {difficulty: task.chance(difficulty) for difficulty in scores["accuracy"]}
    metrics = {f"{name}_{difficulty}": value for name, of in scores.items() for difficulty, value in of.items()}
    return metrics | {name: sum(of.values()) / len(of) for name, of in scores.items()}


def check_judged(trainer: Any, rows: Any) -> bool:
    """Tell whether rows are judged by difficulty here: where they have one, and the trainer no metrics of its own.

    Raises:
        ValueError: no rows, or rows that have a difficulty but no labels.
    """
    own = trainer.compute_metrics, trainer.preprocess_logits_for_metrics
    if own != (None, None) or not isinstance(rows, Sequence | datasets.Dataset):
        return False
    if not len(rows):
        raise ValueError("the evaluation dataset has no rows: give at least one, or set eval_strategy='no'")
    if "difficulty" not in rows[0]:
        return False
    if "labels" not in rows[0]:
        raise ValueError("the evaluation rows have a difficulty but no labels to judge by: add a labels column")
    return True


@contextmanager
def judging(trainer: Any, rows: Any, task: Task | None) -> Iterator[None]:
    """Let what a Trainer evaluates while it is open be judged by difficulty, where its rows have one.

    Args:
        trainer: left as it is where it has metrics of its own.
        rows: what is evaluated.
        task: judges them.

    Raises:
        ValueError: no rows, or rows that have a difficulty but no labels.
    """
    own = trainer.compute_metrics, trainer.preprocess_logits_for_metrics
    if not check_judged(trainer, rows):
        yield
        return
    given = {name: getattr(trainer.args, name) for name in IN_ORDER}
    trainer.compute_metrics = partial(accuracy_by_difficulty, rows, task)
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
    vars(trainer.args).update(IN_ORDER)
    try:
        yield
    finally:
        vars(trainer.args).update(given)
        trainer.compute_metrics, trainer.preprocess_logits_for_metrics = own


class GenerationEvaluation(TrainerCallback):
    """Lets the model generate answers after each evaluation, and reports exact matches by difficulty and by N.

    `eval_generate_accuracy_{difficulty}_passes_{N}`, and without the difficulty their mean over difficulties, are added
    to the evaluation's metrics and logged. Rows that have no difficulty get their mean alone. Generation is greedy, and
    an answer counts when all of its tokens are right. Every rank generates every answer.

    Args:
        trainer: whose `log` reports it.
        rows: with `labels`, `input_ids` or `prompt_ids`, and, all or none, `difficulty`. The prompt is `prompt_ids`, or
            the tokens before the first label, which may have `sleep_after`; the answer is the labels.
        sleep_passes: each N to generate with.
        batch_size: rows that are generated at once, padded on the left.

    Raises:
        TypeError: without a trainer.
        ValueError: a row without an answer, or whose labels are no text that follows the prompt, or with both
            `prompt_ids` and `sleep_after`; no rows, or some with a difficulty and some without.

    Source: Lee et al. 2026 (arXiv 2605.26099), exact match on GSM-Infinite.
    """

    def __init__(
        self, trainer: Trainer, rows: Sequence[Mapping[str, Any]], sleep_passes: tuple[int, ...], batch_size: int = 8
    ):
        self.trainer, self.sleep_passes, self.batch_size = check_trainer(self, trainer), sleep_passes, batch_size
        if len({"difficulty" in row for row in rows}) != 1:
            some = sum("difficulty" in row for row in rows)
            raise ValueError(
                f"GenerationEvaluation: of the {len(rows)} rows {some} have a difficulty: "
                "give at least one row, and all of them one or none"
            )
        self.rows = [(row.get("difficulty"), *prompt_and_answer(row)) for row in rows]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Before those that stop or choose by what it reports, though it can only be added after them.
        callbacks = self.trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: Any = None, **kwargs: Any
    ) -> None:
        mine: dict[str, float] = {}
        for passes in self.sleep_passes:
            right: dict[Any, list[bool]] = defaultdict(list)
            for start in range(0, len(self.rows), self.batch_size):
                rows = self.rows[start : start + self.batch_size]
                for (difficulty, _, answer), said in zip(rows, self._generate(model, rows, passes), strict=True):
                    right[difficulty].append(said[: len(answer)] == answer)
            scores = {difficulty: sum(hits) / len(hits) for difficulty, hits in sorted(right.items())}
            levels = {level: score for level, score in scores.items() if level is not None}
            mine |= {f"eval_generate_accuracy_{level}_passes_{passes}": score for level, score in levels.items()}
            mine[f"eval_generate_accuracy_passes_{passes}"] = sum(scores.values()) / len(scores)
        metrics.update(mine)
        self.trainer.log(mine)

    @staticmethod
    def _generate(model: Any, rows: list[tuple[Any, dict[str, list], list[int]]], passes: int) -> list[list[int]]:
        batch = SleepCollator(padding_side="left")([prompt for _, prompt, _ in rows])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        longest = max(len(answer) for _, _, answer in rows)
        with greedy_config(model):
            ids = model.generate(**batch, max_new_tokens=longest, do_sample=False, sleep_passes=passes)
        return ids[:, batch["input_ids"].shape[1] :].tolist()


@contextmanager
def greedy_config(model: Any) -> Iterator[None]:
    """Set aside, while it is open, what a generation config asks for but the ends: a penalty on repetition, say.

    It is set where a module holds one. What PEFT's `generate` gives to the model inside is then what that has already.
    """
    own = model.generation_config
    greedy = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    held = [(module, module.generation_config) for module in model.modules() if "generation_config" in vars(module)]
    for module, _ in held:
        module.generation_config = greedy
    try:
        yield
    finally:
        for module, config in held:
            module.generation_config = config


def check_trainer(callback: TrainerCallback, trainer: Any) -> Trainer:
    """Return `trainer`, or raise `TypeError` that says how a callback that logs is added."""
    if not isinstance(trainer, Trainer):
        name = type(callback).__name__
        raise TypeError(
            f"{name} needs the trainer whose log reports it, not {type(trainer).__name__}: "
            f"make the trainer first, then trainer.add_callback({name}(trainer, ...))"
        )
    refuse_prompts(getattr(trainer, "model", None))
    return trainer


def prompt_and_answer(row: Mapping[str, Any]) -> tuple[dict[str, list], list[int]]:
    """What a row asks with, a row for `SleepCollator`, and the tokens that answer it."""
    labelled = [i for i, label in enumerate(row["labels"]) if label != IGNORED]
    answer = [row["labels"][i] for i in labelled]
    if answer and "prompt_ids" in row:
        if "sleep_after" in row:
            raise ValueError(
                "GenerationEvaluation: a row has prompt_ids and sleep_after, which says of its input_ids where it "
                "sleeps: leave one of them out"
            )
        return {"input_ids": list(row["prompt_ids"])}, answer
    if not answer or not labelled[0] or list(row["input_ids"][labelled[0] : labelled[-1] + 1]) != answer:
        raise ValueError(
            "GenerationEvaluation: a row's labels must be one answer, token after token as in its input_ids, "
            "after a prompt; where they are not, teacher-forced accuracy (SleepTrainer.evaluate) can judge it"
        )
    mask = row.get("attention_mask", [1] * labelled[0])
    kept = [i for i in range(labelled[0]) if mask[i]]
    return {name: [row[name][i] for i in kept] for name in ("input_ids", "sleep_after") if name in row}, answer
