"""The folder that every recipe writes, with config.json, metrics.jsonl and accuracy.png, and how a run continues."""

import io
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import psutil
import torch
import torch.distributed as dist
import transformers
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback, TrainerState

import hf_sleep
from hf_sleep.files import write_file

plt.switch_backend("agg")

# These may be others when a run continues.
NOT_COMPARED = ("output", "threads", "minutes", "resume")


class RunFolder(TrainerCallback):
    """A run's folder; as a callback of the Trainer it writes down all that is logged. Only the main process writes.

    Args:
        path: made where missing.
        settings: what the run was started with, for config.json.
        resume: continue in a folder that another run has written to; `None` where a recipe cannot.

    Raises:
        SystemExit: a folder that holds a run, without `resume`, or one of a run with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool | None = None):
        self.path, self.metrics, self.began = path, path / "metrics.jsonl", time.monotonic()
        self.writes = os.environ.get("RANK", "0") == "0"
        path.mkdir(parents=True, exist_ok=True)
        if not self.writes:
            return
        config = path / "config.json"
        settings = json.loads(json.dumps(settings, default=str)) | {"processes": int(os.environ.get("WORLD_SIZE", 1))}
        if config.exists():
            if not resume:
                hint = "" if resume is None else ", or continue with --resume"
                raise SystemExit(f"{path} holds a run already: choose another --output{hint}")
            before = json.loads(config.read_text(encoding="utf-8"))["settings"]
            compared = [key for key in settings if key not in NOT_COMPARED]
            if changed := {
                key: (before.get(key), settings[key]) for key in compared if before.get(key) != settings[key]
            }:
                raise SystemExit(f"{path} was begun with other settings, {changed} (then, now): use a new --output")
        versions = {m.__name__: m.__version__ for m in (torch, transformers, hf_sleep)}
        versions["python"] = platform.python_version()
        written = {"settings": settings, "versions": versions, "threads": torch.get_num_threads()}
        write_file(config, json.dumps(written, indent=1) + "\n")

    def record(self, **row: Any) -> None:
        """Append a line to metrics.jsonl."""
        if not self.writes:
            return
        # Whole, as all that a run leaves: a line that was cut short would end every later reader.
        before = self.metrics.read_bytes() if self.metrics.exists() else b""
        write_file(self.metrics, before + json.dumps(row).encode() + b"\n")

    def seconds(self, model: str) -> float:
        """Seconds for which a model was trained, over all runs."""
        rows = map(json.loads, self.metrics.read_text(encoding="utf-8").splitlines()) if self.metrics.exists() else ()
        return sum(row.get("seconds", 0.0) for row in rows if row["model"] == model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.record(step=state.global_step, seconds=round(time.monotonic() - self.began, 1), **logs)

    def plot(self, scores: dict[str, dict[int, list[float]]], chance: dict[int, float], difficulty: str) -> Path:
        """Accuracy by difficulty, a line per model with the range over its seeds, and chance.

        Args:
            scores: by label and difficulty, the accuracy of every seed.
            chance: by difficulty.
            difficulty: what the horizontal axis is called.
        """
        figure, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
        for label, by_difficulty in scores.items():
            x = sorted(by_difficulty)
            mean = [sum(by_difficulty[d]) / len(by_difficulty[d]) for d in x]
            low = [m - min(by_difficulty[d]) for m, d in zip(mean, x, strict=True)]
            high = [max(by_difficulty[d]) - m for m, d in zip(mean, x, strict=True)]
            axes.errorbar(x, mean, yerr=(low, high), marker="o", capsize=3, label=label)
        x = sorted(chance)
        axes.plot(x, [chance[d] for d in x], "k:", label="chance")
        axes.set(xlabel=difficulty, ylabel="exact-match accuracy", ylim=(-0.02, 1.02), xticks=x)
        axes.legend(fontsize=8)
        return self._write(figure, "accuracy.png")

    def plot_losses(self) -> Path:
        """What a `DistillationTrainer` logs, by step, thin, and the losses that were evaluated."""
        losses: dict[str, dict[int, float]] = {}
        for row in map(json.loads, self.metrics.read_text(encoding="utf-8").splitlines()):
            for name in row:
                if name in ("cross_entropy", "divergence") or (name.startswith("eval_") and name.endswith("_loss")):
                    losses.setdefault(name, {})[row["step"]] = row[name]
        figure, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
        for name, by_step in losses.items():
            steps, held_out = sorted(by_step), name.startswith("eval_")
            label = name.removeprefix("eval_").replace("_", " ") + (", held out" if held_out else ", in training")
            style = {"marker": "o"} if held_out else {"linewidth": 0.8}
            axes.plot(steps, [by_step[step] for step in steps], label=label, **style)
        axes.set(xlabel="optimizer steps", ylabel="nats per token")
        axes.legend(fontsize=8)
        return self._write(figure, "loss.png")

    def _write(self, figure: Any, name: str) -> Path:
        """Write a figure into the folder and close it."""
        file, image = self.path / name, io.BytesIO()
        figure.savefig(image, format="png", dpi=150)
        plt.close(figure)
        write_file(file, image.getvalue())
        return file


class TimeBudget(TrainerCallback):
    """Saves a checkpoint and stops training after the first step that ends when the process is so many minutes old.

    Imports and evaluations count, on whichever rank is the oldest; all ranks stop together. The last step is saved too,
    early or late, so that what follows training may be interrupted. Under FSDP, which cannot evaluate what it has not
    trained, a run continues from its last step to its end.

    Args:
        minutes: `None`: nothing is saved or stopped.

    Attributes:
        stopped: what to tell the user, empty while there is time.
    """

    def __init__(self, minutes: float | None):
        self.minutes, self.stopped = minutes, ""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        last = state.global_step == state.max_steps
        if self.minutes is None or (last and isinstance(model, FSDPModule)):
            return
        over = process_seconds() >= 60 * self.minutes
        if dist.is_initialized():
            anyone = torch.tensor(int(over), device=args.device)
            dist.all_reduce(anyone, dist.ReduceOp.MAX)
            over = bool(anyone)
        if over:
            self.stopped = (
                f"stopped at step {state.global_step} of {state.max_steps}, after {self.minutes:g} minutes: "
                "the same command with --resume continues"
            )
            control.should_log = control.should_training_stop = True
        control.should_save |= over or last


def process_seconds() -> float:
    """Seconds since this process was started."""
    return time.time() - psutil.Process().create_time()


def last_checkpoint(folder: Path) -> tuple[str | None, int]:
    """The Trainer's last whole checkpoint in `folder` and the optimizer steps up to it; `None`, 0 where there is none.

    One whose writing was cut short lacks trainer_state.json, which comes last.
    """
    steps = [int(file.parent.name.rpartition("-")[2]) for file in folder.glob("checkpoint-*/trainer_state.json")]
    return (str(folder / f"checkpoint-{max(steps)}"), max(steps)) if steps else (None, 0)


def train_on(trainer: Trainer, checkpoint: str | None) -> None:
    """Train to the last step, from a checkpoint if there is one."""
    state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json") if checkpoint else TrainerState()
    if state.global_step < trainer.args.max_steps:
        trainer.train(resume_from_checkpoint=checkpoint)
        return
    # From a checkpoint of the last step `Trainer.train` would train one step more.
    trainer.state = state
    if isinstance(trainer.model, PeftModel):
        set_peft_model_state_dict(trainer.model, load_peft_weights(checkpoint))
    else:
        trainer.model.load_state_dict(hf_sleep.SleepForCausalLM.from_pretrained(checkpoint).state_dict())


def mean_and_spread(values: list[float]) -> str:
    """`.98`, or with several seeds `.98±.01`: mean and sample standard deviation."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.2f}±{spread:.2f}"
