# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-sleep[train]"]
#
# [tool.uv.sources]
# hf-sleep = { path = "..", editable = true }
# ///
"""Teach a pretrained model to remember, from plain text. The base itself, reading with its full cache, is the teacher.

python recipes/remember.py                                     # SmolLM2 as `make demo` left it, Python's documentation
python recipes/remember.py --text book.txt notes/ --minutes 60                            # then again with --resume
accelerate launch recipes/remember.py --model Qwen/Qwen3-0.6B --dataset my/corpus --column text --steps 2000 --lora 16

Loss on every token: next-token cross-entropy, and the divergence from what the base says where it still sees the whole
row. Rows are windows of text in order, few at first and more later; some end with questions that ask to repeat a
passage which was slept on by then. Tokens of spans that stood in the text over a window ago weigh more. The last
twentieth of the text is held out. New blocks alone are trained, with --lora the base's adapter too, with --whole-model
everything. With --minutes a run can be done in parts: the same command with --resume continues it. Writes config.json,
metrics.jsonl, results.json, loss.png, position.png and the model.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from shared.arguments import argument
from shared.finetuning import Retrofit, complete, load, parse_fine_tuning, training_arguments
from shared.run_folder import RunFolder, TimeBudget, last_checkpoint, train_on
from shared.texts import documents
from transformers import AutoTokenizer, TrainerCallback, set_seed

from hf_sleep import sleep_lora_config
from hf_sleep.data import Text, TextRows
from hf_sleep.eval import PositionLosses, losses_asleep, losses_of_base
from hf_sleep.eval.position import asleep
from hf_sleep.eval.report import plot_positions
from hf_sleep.files import write_file
from hf_sleep.hub import CardFacts
from hf_sleep.labels import IGNORED
from hf_sleep.lora import without_wrapper
from hf_sleep.training import Distillation, DistillationTrainer, NonFiniteGuard, SleepCollator, SpikeGuard

RATES = {False: (1e-2, 1e-3), True: (1e-3, 5e-5)}
"""Learning rates of Muon and AdamW, by whether the whole model is trained."""


@dataclass
class Arguments(Retrofit):
    text: list[Path] = argument([], "files and folders; none, and no --dataset: Python's language reference")
    dataset: str | None = argument(None, "Hub id, folder or file of a dataset, instead of --text")
    column: str = argument("text", "of the dataset")
    split: str = argument("train", "of the dataset")
    most_tokens: int | None = argument(None, "tokens of the text to stop reading after; None: all")
    window_size: int | None = argument(None, "L, in tokens; None: 128, or as the checkpoint was trained")
    sleep_passes: int | None = argument(None, "N; None: 1, or as the checkpoint was trained")
    between: str | None = argument(
        None, "step between passes: none or gate; None: none with --whole-model, otherwise the base's"
    )
    windows: list[int] = argument([2, 4], "windows of a row, for as many steps each, rising")
    reconstruct: float = argument(0.2, "share of the rows that ask to repeat a passage")
    sleep_at_ends: bool = argument(False, "sleep at the end of every document too; not with FSDP")
    distill: float = argument(0.5, "share of the loss that is the divergence from the teacher; 0: no teacher")
    top_k: int = argument(32, "tokens of the teacher's distribution that are told apart; 0: all")
    recurring_weight: float = argument(2.0, "of tokens of spans that stood in the row over a window ago")
    recurring_tokens: int = argument(4, "length of such a span")
    pass_states: float = argument(0.0, "share of the steps whose rows begin with other rows' fast weights")
    lora: int | None = argument(None, "rank of an adapter of the base, trained too, and merged at the end")
    steps: int = argument(200, "optimizer steps")
    batch_size: int = argument(2, "rows that a process reads at once")
    gradient_accumulation_steps: int = argument(4, "batches per optimizer step")
    muon_learning_rate: float | None = argument(
        None, "of the matrices; 0: AdamW for everything; None: 1e-2, with --whole-model 1e-3"
    )
    learning_rate: float | None = argument(
        None, "of AdamW, for all that Muon does not take; None: 1e-3, with --whole-model 5e-5"
    )
    evaluations: int = argument(4, "times that the held-out loss is measured, the last after training; and once before")
    eval_rows: int = argument(16, "held-out rows of each kind")
    output: Path = argument(Path("runs/remember"), "a folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.windows != sorted({*self.windows}) or not self.windows or self.windows[0] < 1:
            raise ValueError(f"--windows {' '.join(map(str, self.windows))}: they must be at least 1, and rise")
        if len(self.windows) > self.steps:
            raise ValueError(f"--windows has {len(self.windows)} stages: there must be as many --steps at least")
        if self.lora is not None and self.lora < 1:
            raise ValueError(f"--lora {self.lora}: it must be a rank of at least 1")
        if self.lora is not None and (self.whole_model or self.push_to_hub):
            raise ValueError("--lora with --whole-model or --push-to-hub: leave one of them out")
        for name, least in (("evaluations", 1), ("eval_rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: it must be at least {least}")

    def stages(self, rows: int) -> list[tuple[int, int]]:
        """Rows and windows of every stage, at so many rows per step."""
        ends = [round(self.steps * (i + 1) / len(self.windows)) for i in range(len(self.windows))]
        return [
            (rows * (end - begin), windows) for begin, end, windows in zip([0, *ends], ends, self.windows, strict=False)
        ]


class Judge(TrainerCallback):
    """Measures before the first step and some times in training, on text that was not trained on.

    Args:
        trainer: whose `log` reports it.
        rows: by name, rows of a kind.
        options: of the run.

    The base is measured when this is made, as it is before training.

    Attributes:
        positions: what was last found by position; `None` where it cannot be: of rows of one window, of rows that the
            base has no positions for, and under FSDP, which has no cache.
    """

    positions: PositionLosses | None = None

    def __init__(self, trainer: DistillationTrainer, rows: dict[str, list[dict[str, Any]]], options: Arguments):
        self.trainer, self.rows, self.options = trainer, rows, options
        self.due = {round(options.steps * i / options.evaluations) for i in range(1, options.evaluations)}
        self.base = None
        self.ids = torch.tensor([row["input_ids"] for row in rows["text"]])
        most = getattr(without_wrapper(trainer.model).config.text_config, "max_position_embeddings", None)
        has_room = most is None or self.ids.shape[1] <= most
        if not trainer.is_fsdp_enabled and options.windows[-1] > 1 and has_room:
            self.base = self._measured(losses_of_base)

    def _measured(self, losses: Callable[..., dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        model = without_wrapper(self.trainer.model)
        was, _ = model.training, model.eval()
        try:
            with self.trainer.accelerator.autocast():
                return losses(model, self.ids, batch_size=self.options.batch_size)
        finally:
            model.train(was)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:
            self._report(state, self.measure() | self.by_position())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.due:
            is_due = control.should_log
            self._report(state, self.measure())
            control.should_log = is_due  # what is logged here says that the step's own log is over

    def _report(self, state: Any, measured: dict[str, Any]) -> None:
        state.log_history.append({"step": state.global_step, "judged": measured})
        self.trainer.log({f"eval_{name}": value for name, value in measured.items() if isinstance(value, float)})

    def by_position(self) -> dict[str, Any]:
        """What a memory gives back of what has left the window; `recovered` is `None` where there is nothing to."""
        if self.base is None:
            return {}
        self.positions = found = PositionLosses(self.options.window_size, self._measured(losses_asleep) | self.base)
        plain = found.to_dict()
        mine = plain["reads"][asleep(self.options.sleep_passes)]
        return {name: mine[name] for name in ("recovered", "by_memory")} | {"position": plain}

    def measure(self) -> dict[str, Any]:
        """Mean losses of every kind of rows."""
        model = self.trainer.model
        was, _ = model.training, model.eval()
        try:
            return {f"{name}_loss": self._loss(model, rows) for name, rows in self.rows.items()}
        finally:
            model.train(was)

    @torch.no_grad()
    def _loss(self, model: Any, rows: list[dict[str, Any]]) -> float:
        """Mean loss over the labels of `rows`, in nats."""
        total, count, size = 0.0, 0, self.options.batch_size
        # As in training it makes logits a window at a time, for the loss alone; its layers stay as in evaluation.
        without_wrapper(model).training = True
        for first in range(0, len(rows), size):
            batch = {name: t.to(model.device) for name, t in SleepCollator()(rows[first : first + size]).items()}
            labels = int((batch["labels"] != IGNORED).sum())
            with self.trainer.accelerator.autocast():
                total += model(**batch, use_cache=False).loss.item() * labels
            count += labels
        without_wrapper(model).training = False
        return total / count


def held_out_rows(options: Arguments, text: Text, tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
    """Rows to judge by: text in order, and, where some are trained on, rows that ask."""
    most = options.windows[-1]
    if len(text) < most * options.window_size:
        raise ValueError(
            f"the held-out twentieth of the text has {len(text)} tokens, and a row of {most} windows "
            f"{most * options.window_size}: give more --text, fewer --windows or a smaller --window-size"
        )
    settings = {"window_size": options.window_size, "sleep_at_ends": options.sleep_at_ends}
    stages = [(options.eval_rows, most)]
    rows = {"text": TextRows(text, tokenizer, stages=stages, **settings).in_order(options.eval_rows, most)}
    if options.reconstruct and most > 1:
        asking = TextRows(text, tokenizer, stages=stages, reconstruct=1.0, **settings)
        rows["asked"] = [asking[i] for i in range(len(asking))]
    return rows


def make_trainer(
    options: Arguments, run: RunFolder, text: Text, tokenizer: Any, budget: TimeBudget
) -> DistillationTrainer:
    """The trainer with its guards; what judges it comes later."""
    arguments = training_arguments(
        options,
        run.path / "model",
        pass_states=options.pass_states,
        # A row follows from its number alone, so that those of the steps that are over are left out, unread.
        ignore_data_skip=False,
        train_sampling_strategy="sequential",
    )
    size = options.batch_size * options.gradient_accumulation_steps * arguments.world_size
    rows = TextRows(
        text,
        tokenizer,
        options.window_size,
        options.stages(size),
        options.seed,
        options.reconstruct,
        options.sleep_at_ends,
    )
    model = load(options)
    if options.lora:
        model = get_peft_model(model, sleep_lora_config(model, r=options.lora))
    trainer = DistillationTrainer(
        model,
        arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[run, budget],
        distillation=Distillation(options.distill, options.top_k, options.recurring_weight, options.recurring_tokens),
    )
    if not trainer.is_fsdp_enabled:
        trainer.add_callback(NonFiniteGuard())
        trainer.add_callback(SpikeGuard(trainer))
    return trainer


def save(options: Arguments, run: RunFolder, trainer: DistillationTrainer, tokenizer: Any, tokens: int) -> None:
    """Write the model with its card; an adapter is merged into it."""
    size = options.batch_size * options.gradient_accumulation_steps * trainer.args.world_size
    source = options.dataset or ", ".join(map(str, options.text)) or "Python's language reference"
    said = (
        f"{tokens:,} tokens of {source}; {options.steps} steps of {size} rows of up to {options.windows[-1]} windows. "
        f"The base, with its full cache, was the teacher (share of the loss: {options.distill:g}); "
        f"{options.reconstruct:.0%} of the rows asked to repeat a passage."
    )
    folder = run.path / "model"
    if options.lora:
        if run.writes:
            merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
            merged.card = CardFacts(said)
            merged.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return
    trainer.model.card = CardFacts(said)
    trainer.save_model()  # and, with --push-to-hub, pushes


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    options = parse_fine_tuning(Arguments, __doc__, arguments)
    # Where all of the model is trained, a gate between the passes is in the way.
    complete(options, window_size=128, sleep_passes=1, **({"between": "none"} if options.whole_model else {}))
    muon, adamw = RATES[options.whole_model]
    options.muon_learning_rate = muon if options.muon_learning_rate is None else options.muon_learning_rate
    options.learning_rate = adamw if options.learning_rate is None else options.learning_rate
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse_arguments(arguments)
    set_seed(options.seed)
    run = RunFolder(options.output, vars(options), options.resume)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    read = documents(options.text, options.dataset, options.column, options.split)
    text, held_out = Text.of(read, tokenizer, options.most_tokens).held_out()
    budget = TimeBudget(options.minutes)
    try:
        trainer = make_trainer(options, run, text, tokenizer, budget)
        judge = Judge(trainer, held_out_rows(options, held_out, tokenizer), options)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    trainer.add_callback(judge)
    train_on(trainer, last_checkpoint(run.path / "model")[0])
    if budget.stopped:
        if run.writes:
            print(budget.stopped)
        return {}
    before = next(logs["judged"] for logs in trainer.state.log_history if "judged" in logs)
    after = judge.measure() | judge.by_position()
    results = {"tokens": len(text), "before": before, "after": after}
    said = [name for name, value in after.items() if isinstance(value, float)]
    run.record(step=options.steps, **{f"eval_{name}": after[name] for name in said})
    save(options, run, trainer, tokenizer, len(text))
    if run.writes:
        write_file(run.path / "results.json", json.dumps(results, indent=1) + "\n")
        for name in said:
            print(f"held-out {name.replace('_', ' ')}: {before[name]:.3f} before, {after[name]:.3f} after")
        if judge.positions is not None:
            plot_positions(judge.positions, run.path / "position.png")
        print(f"{run.plot_losses()}, {run.path / 'model'}")
    return results


if __name__ == "__main__":
    main()
