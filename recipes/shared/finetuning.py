"""Fine-tuning a pretrained model to sleep on a task in words: arguments, training in parts, and what is measured."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, set_seed

from hf_sleep import AutoModelForSleepLM, SleepForCausalLM, SleepLMConfig, default_dtype
from hf_sleep.compat import CHECKPOINTING
from hf_sleep.data import GSMInfinite, Managers
from hf_sleep.eval import Score, by_difficulty, lines_of, problems, table
from hf_sleep.files import write_file
from hf_sleep.hub import CardFacts
from hf_sleep.modeling.plain import source_of
from hf_sleep.training import (
    HardEvictionWarmup,
    NonFiniteGuard,
    SleepMonitor,
    SleepTrainer,
    SleepTrainingArguments,
    SpikeGuard,
    freeze_all_but_fast_weights,
)

from .answers import Answers
from .arguments import InParts, argument, parse, require_pair
from .run_folder import RunFolder, TimeBudget, last_checkpoint, train_on

SLEEP_FIELDS = (
    *("window_size", "sleep_passes", "eviction", "num_sink_tokens", "loop_layers", "between", "decay_once"),
    *("num_blocks", "block_layers", "block_num_heads", "block_head_dim", "block_half_lives"),
)
Words = GSMInfinite | Managers


@dataclass
class Retrofit(InParts):
    """The arguments of all recipes that train a pretrained model to sleep."""

    model: str = argument(".demo/SmolLM2-135M-Instruct", "Hub id or folder, of a base or of a model that sleeps")
    window_size: int | None = argument(None, "L, in tokens; None: 64, or as the checkpoint was trained")
    sleep_passes: int | None = argument(None, "N; None: 2, or as the checkpoint was trained")
    eviction: str | None = argument(
        None, "what becomes of the KV; None: hard, or as the checkpoint was trained", choices=("hard", "sliding")
    )
    num_sink_tokens: int | None = argument(
        None, "first tokens that are never evicted; None: 0, or as the checkpoint was trained"
    )
    loop_layers: list[int] | None = argument(
        None, "a b: layers a to b - 1 run N times; None: the middle third, or the base's"
    )
    between: str | None = argument(None, "step between passes: none or gate; None: the base's")
    decay_once: bool | None = argument(None, "passes 2 to N do not decay; None: no, or as the checkpoint was trained")
    num_blocks: int | None = argument(
        None, "new blocks, evenly spaced in the loop; None: one per four layers, and none in a hybrid"
    )
    block_layers: list[int] | None = argument(None, "layers after which a new block comes, instead of --num-blocks")
    block_num_heads: int | None = argument(None, "of a new block; None: a third of the width")
    block_head_dim: int | None = argument(None, "of a new block; None: the base's")
    block_half_lives: list[float] | None = argument(
        None, "shortest and longest of a new block's heads at first, in windows; 0 0: Mamba's; None: the library's"
    )
    steps: int = argument(60, "optimizer steps")
    batch_size: int = argument(8, "rows that a process reads at once")
    gradient_accumulation_steps: int = argument(1, "batches per optimizer step")
    muon_learning_rate: float = argument(1e-2, "of the matrices; 0: AdamW for everything")
    learning_rate: float = argument(1e-3, "of AdamW, for all that Muon does not take")
    whole_model: bool = argument(False, "train the base too, not just the fast weights")
    checkpointing: bool = argument(False, "recompute passes in the backward, to save memory")
    bf16: bool = argument(False, "compute in bfloat16, by autocast; by default where the machine has it")
    save_steps: int = argument(0, "steps between checkpoints; 0: none")
    report_to: list[str] = argument(["none"], "as in transformers: tensorboard, wandb, ...")
    push_to_hub: str | None = argument(None, "push the trained model there", metavar="REPOSITORY")
    seed: int = argument(0, "of new blocks, training rows and their order")
    output: Path = argument(Path("runs/finetune_gsm"), "a folder")

    def __post_init__(self) -> None:
        require_pair("loop-layers", self.loop_layers)
        require_pair("block-half-lives", self.block_half_lives)


@dataclass
class FineTuning(Retrofit):
    """The arguments of all recipes that fine-tune on a task."""

    hard_warmup_steps: int = argument(0, "first steps: hard eviction, fast weights alone")
    eval_passes: list[int] | None = argument(None, "each N to answer with; None: --sleep-passes")
    eval_problems: int = argument(160, "test problems")


def parse_fine_tuning(
    kind: type[Any],
    description: str | None,
    arguments: list[str] | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """Read the command line as `parse` does; `--bf16` is on where the machine has it."""
    native = {"bf16": default_dtype() == torch.bfloat16}
    return parse(kind, description, arguments, {name: native | each for name, each in (presets or {None: {}}).items()})


def complete(options: Any, **of_a_base: Any) -> None:
    """Fill in how to sleep where nothing was said: as the checkpoint does; a base, as small as fits a CPU.

    Args:
        options: `model`, and what of `Retrofit` says how to sleep, which is changed.
        of_a_base: what a base gets instead.
    """
    config = AutoConfig.from_pretrained(options.model)
    small: dict[str, Any] = {"window_size": 64, "sleep_passes": 2, "eviction": "hard"}
    small |= {"num_sink_tokens": 0, "decay_once": False} | of_a_base
    defaults = {name: getattr(config.sleep, name) for name in small} if isinstance(config, SleepLMConfig) else small
    for name, value in defaults.items():
        if getattr(options, name, value) is None:
            setattr(options, name, value)


def load(options: Retrofit) -> SleepForCausalLM:
    given = {name: getattr(options, name) for name in SLEEP_FIELDS}
    sleep = {name: value for name, value in given.items() if value is not None}
    if options.block_half_lives == [0, 0]:
        sleep["block_half_lives"] = None  # the kind's own
    model = AutoModelForSleepLM.from_pretrained(options.model, sleep=sleep, dtype="float32")
    if model.config.base_model_name_or_path == source_of(options.model):
        for block in model.fast_weights.values():
            block.init_weights(model.lm.config.initializer_range)  # from the seed: a retrofit's follow from its base
    if not options.whole_model:
        freeze_all_but_fast_weights(model)
    return model


def training_arguments(options: Retrofit, folder: Path, **more: Any) -> SleepTrainingArguments:
    """The Trainer's arguments; `more` stand in place of what follows from the options."""
    chosen = dict(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        muon_learning_rate=options.muon_learning_rate or None,
        learning_rate=options.learning_rate,
        **{CHECKPOINTING: options.checkpointing},
        bf16=options.bf16,
        logging_steps=max(1, options.steps // 100),
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or options.steps,
        save_total_limit=2,
        # The stream begins where the checkpoint was written.
        ignore_data_skip=True,
        # Rows differ in length, so each process pads its own batches.
        accelerator_config={"dispatch_batches": False},
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to=options.report_to,
        push_to_hub=options.push_to_hub is not None,
        hub_model_id=options.push_to_hub,
        hub_strategy="end",
        seed=options.seed,
    )
    return SleepTrainingArguments(**chosen | more)


def make_trainer(
    options: FineTuning, run: RunFolder, task: Words, rows: Dataset, done: int, budget: TimeBudget
) -> tuple[SleepTrainer, Answers]:
    """The trainer with all of its callbacks, for a run that has done `done` steps, and the one that judges answers."""
    arguments = training_arguments(options, run.path / "model", eval_on_start=done == 0)
    size = options.batch_size * options.gradient_accumulation_steps * arguments.world_size
    trainer = SleepTrainer(
        load(options),
        arguments,
        train_dataset=task.stream(seed=options.seed, start=done * size),
        eval_dataset=rows,
        processing_class=task.tokenizer,
        task=task,
        callbacks=[run, budget],
    )
    passes = tuple(options.eval_passes or [options.sleep_passes])
    answers = Answers(trainer, task, rows, passes, options.batch_size)
    trainer.add_callback(answers)
    if options.hard_warmup_steps:
        trainer.add_callback(HardEvictionWarmup(steps=options.hard_warmup_steps))
    if not trainer.is_fsdp_enabled:
        trainer.add_callback(NonFiniteGuard())
        trainer.add_callback(SpikeGuard(trainer))
        trainer.add_callback(SleepMonitor(trainer))
    return trainer, answers


def finetune(options: FineTuning, task: Words, name: str, difficulty: str, how: str) -> dict[str, Any]:
    """Train, and measure before and after; print and write tables, a plot and the model.

    Args:
        options: completed.
        task: what to train on and to ask.
        name: of the task, for the card.
        difficulty: what the task's difficulty counts.
        how: what the card says of the task's form.

    Returns:
        What results.json holds: `problems`, which tells what was asked, and the scores `before` and `after`; empty
        where the minutes were used up.
    """
    set_seed(options.seed)
    run = RunFolder(options.output, vars(options), options.resume)
    folder = run.path / "model"
    last, done = last_checkpoint(folder)
    rows = task.dataset(options.eval_problems, seed=options.seed, split="test")
    budget = TimeBudget(options.minutes)
    trainer, answers = make_trainer(options, run, task, rows, done, budget)
    train_on(trainer, last)
    if budget.stopped:
        if run.writes:
            print(budget.stopped)
        return {}
    # Evaluating before train() would leave the model unwrapped: DDP would not share gradients, and not say so.
    before = next(logs["answers"] for logs in trainer.state.log_history if "answers" in logs)
    trainer.evaluate()
    results = {"problems": problems(rows), "before": before, "after": answers.scores}
    size = options.batch_size * options.gradient_accumulation_steps * trainer.args.world_size
    trainer.model.card = CardFacts(
        f"{task}, made by hf_sleep; {options.steps} steps of {size} problems, {how}, loss on the answer.",
        [{"task": name} | score for score in by_difficulty(results["after"])],
    )
    trainer.save_model()  # and, with --push-to-hub, pushes
    if run.writes:
        write_file(run.path / "results.json", json.dumps(results, indent=1) + "\n")
        lines = result_lines(results)
        print(f"\n{table(lines, difficulty)}\n\n{plot(run, lines, difficulty)}, {folder}")
    return results


def result_lines(results: dict[str, Any]) -> dict[str, list[Score]]:
    """Scores by difficulty of everything that was read, before and after."""
    return {f"{when}, {how}": found for when in ("before", "after") for how, found in lines_of(results[when]).items()}


def plot(run: RunFolder, lines: dict[str, list[Score]], difficulty: str) -> Path:
    """Accuracy by difficulty, a line for each label."""
    accuracy = {label: {s["difficulty"]: [s["accuracy"]] for s in scores} for label, scores in lines.items()}
    return run.plot(accuracy, {s["difficulty"]: s["chance"] for s in next(iter(lines.values()))}, difficulty)
