"""A callback that asks a model about a task's test rows after each evaluation."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from hf_sleep.data.task import Row, Task
from hf_sleep.eval import Score, measure
from hf_sleep.training import SleepTrainer


class Answers(TrainerCallback):
    """Judges the model's answers after each evaluation, at each N and with the controls of `hf_sleep.eval.measure`.

    All scores are added to the Trainer's history, and logged.

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
            self.scores = measure(
                model, self.task, self.rows, self.sleep_passes, self.batch_size, ("last_window", "full")
            )
        state.log_history.append({"step": state.global_step, "answers": self.scores})
        self.trainer.log(
            {
                "_".join(["eval", score["reads"], *([score["mode"]] if "mode" in score else [])])
                + f"_{score['difficulty']}_passes_{score['N']}": score["accuracy"]
                for score in self.scores
            }
        )
