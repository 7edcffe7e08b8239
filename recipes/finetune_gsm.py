"""GSM-Infinite: teach a pretrained model to sleep on a text of quantities, and then to work out the one asked for.

accelerate launch recipes/finetune_gsm.py                 # SmolLM2 as `make demo` left it; minutes on two CPU cores
accelerate launch recipes/finetune_gsm.py --model Qwen/Qwen3-0.6B --window-size 256 --tokens 700 1200 --steps 2000
accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/finetune_gsm.py --preset paper-jet-nemotron

The question comes first, there is no chain of thought, and the loss is on the answer alone. By default only the new
blocks are trained, at learning rates that are too high for a whole model. Answers are generated before and after, also
from the last window alone: what is above that and above chance (the commonest answer) was remembered. With --minutes a
run can be done in parts: the same command with --resume continues it. Writes config.json, metrics.jsonl, results.json,
accuracy.png and the model.

Source: Lee et al. 2026 (arXiv 2605.26099), the GSM-Infinite experiment, for the presets. Steps, and how they are shared
out between a sliding preset's stages (the paper counts epochs), are ours, as are SmolLM2's model and lengths. A
preset's batch is 256 rows on one process: divide --gradient-accumulation-steps by the number of processes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from shared.arguments import InParts, argument, parse, require_pair
from shared.run_folder import RunFolder, TimeBudget, last_checkpoint, train_on
from shared.scores import by_difficulty, generation_rows, generation_scores, plot, table
from transformers import AutoConfig, AutoTokenizer, set_seed

from hf_sleep import AutoModelForSleepLM, SleepForCausalLM, SleepLMConfig, default_dtype
from hf_sleep.compat import CHECKPOINTING
from hf_sleep.data import GSMInfinite
from hf_sleep.files import write_file
from hf_sleep.hub import CardFacts
from hf_sleep.training import (
    GenerationEvaluation,
    HardEvictionWarmup,
    NonFiniteGuard,
    SleepMonitor,
    SleepTrainer,
    SleepTrainingArguments,
    freeze_all_but_fast_weights,
)

PAPER = {
    "ops": [1, 8],
    "tokens": [2000, 3300],
    "window_size": 2000,
    "eviction": "hard",
    "batch_size": 2,
    "gradient_accumulation_steps": 128,
    "muon_learning_rate": 1e-3,
    "learning_rate": 5e-5,
    "steps": 1000,
    "save_steps": 50,
    "eval_problems": 1600,
    "whole_model": True,
    "checkpointing": True,
    "block_half_lives": [0, 0],
}
OURO = PAPER | {
    "model": "ByteDance/Ouro-1.4B",
    "sleep_passes": 4,
    "loop_layers": [0, 24],
    "block_num_heads": 12,
    "block_head_dim": 96,
    "eval_passes": [1, 4],
}
# The paper's sliding setting at a quarter of its lengths, so that a row has as many windows.
SMOLLM2 = PAPER | {
    "tokens": [500, 825],
    "window_size": 128,
    "num_blocks": 6,
    "batch_size": 128,
    "gradient_accumulation_steps": 2,
    "steps": 300,
    "block_half_lives": None,
}
PRESETS = {
    "small": {},
    "smollm2": SMOLLM2,
    "smollm2-sliding": SMOLLM2 | {"eviction": "sliding", "hard_warmup_steps": 100},
    "paper-jet-nemotron": PAPER
    | {"model": "jet-ai/Jet-Nemotron-2B", "sleep_passes": 6, "loop_layers": [7, 21], "eval_passes": [1, 6]},
    "paper-ouro": OURO,
    "paper-ouro-sliding": OURO | {"window_size": 512, "eviction": "sliding", "steps": 1500, "hard_warmup_steps": 500},
}
SLEEP_FIELDS = (
    *("window_size", "sleep_passes", "eviction", "num_sink_tokens"),
    *("loop_layers", "num_blocks", "block_num_heads", "block_head_dim", "block_half_lives"),
)


@dataclass
class Arguments(InParts):
    preset: str = argument("small", "settings that stand where none is given", choices=tuple(PRESETS))
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
    num_blocks: int | None = argument(
        None, "new blocks, evenly spaced in the loop; None: one per four layers, and none in a hybrid"
    )
    block_num_heads: int | None = argument(None, "of a new block; None: a third of the width")
    block_head_dim: int | None = argument(None, "of a new block; None: the base's")
    block_half_lives: list[float] | None = argument(
        None, "shortest and longest of a new block's heads at first, in windows; 0 0: Mamba's; None: the library's"
    )
    ops: list[int] = argument([1, 4], "fewest and most operations")
    tokens: list[int] = argument([0, 0], "fewest and most of a prompt, with distractors; 0 0: none")
    steps: int = argument(60, "optimizer steps")
    batch_size: int = argument(8, "rows that a process reads at once")
    gradient_accumulation_steps: int = argument(1, "batches per optimizer step")
    muon_learning_rate: float = argument(1e-2, "of the matrices; 0: AdamW for everything")
    learning_rate: float = argument(1e-3, "of AdamW, for all that Muon does not take")
    hard_warmup_steps: int = argument(0, "first steps: hard eviction, fast weights alone")
    whole_model: bool = argument(False, "train the base too, not just the fast weights")
    checkpointing: bool = argument(False, "recompute passes in the backward, to save memory")
    bf16: bool = argument(False, "compute in bfloat16, by autocast; by default where the machine has it")
    eval_passes: list[int] | None = argument(None, "each N to generate with; None: --sleep-passes")
    eval_problems: int = argument(160, "test problems")
    save_steps: int = argument(0, "steps between checkpoints; 0: none")
    report_to: list[str] = argument(["none"], "as in transformers: tensorboard, wandb, ...")
    push_to_hub: str | None = argument(None, "push the trained model there", metavar="REPOSITORY")
    seed: int = argument(0, "of new blocks, training rows and their order")
    output: Path = argument(Path("runs/finetune_gsm"), "a folder")

    def __post_init__(self) -> None:
        for name in ("loop_layers", "block_half_lives", "ops", "tokens"):
            require_pair(name.replace("_", "-"), getattr(self, name))


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    native = {"bf16": default_dtype() == torch.bfloat16}
    return parse(Arguments, __doc__, arguments, {name: native | preset for name, preset in PRESETS.items()})


def complete(options: Arguments) -> None:
    """Fill in how to sleep where nothing was said: as the checkpoint does; a base, as small as fits a CPU."""
    config = AutoConfig.from_pretrained(options.model)
    small = {"window_size": 64, "sleep_passes": 2, "eviction": "hard", "num_sink_tokens": 0}
    defaults = {name: getattr(config.sleep, name) for name in small} if isinstance(config, SleepLMConfig) else small
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


class Generation(GenerationEvaluation):
    """Generates as the model was trained: with `--bf16`, under autocast."""

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        with self.trainer.accelerator.autocast():
            super().on_evaluate(*args, **kwargs)


def load(options: Arguments) -> SleepForCausalLM:
    sleep = {name: getattr(options, name) for name in SLEEP_FIELDS if getattr(options, name) is not None}
    if options.block_half_lives == [0, 0]:
        sleep["block_half_lives"] = None  # the kind's own
    model = AutoModelForSleepLM.from_pretrained(options.model, sleep=sleep, dtype="float32")
    if model.config.base_model_name_or_path == options.model:
        for block in model.fast_weights.values():
            block.init_weights(model.lm.config.initializer_range)  # from the seed: a retrofit's follow from its base
    if not options.whole_model:
        freeze_all_but_fast_weights(model)
    return model


def training_arguments(options: Arguments, folder: Path, eval_on_start: bool) -> SleepTrainingArguments:
    return SleepTrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        muon_learning_rate=options.muon_learning_rate or None,
        learning_rate=options.learning_rate,
        **{CHECKPOINTING: options.checkpointing},
        bf16=options.bf16,
        eval_on_start=eval_on_start,
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


def make_trainer(
    options: Arguments, run: RunFolder, task: GSMInfinite, rows: Dataset, done: int, budget: TimeBudget
) -> SleepTrainer:
    """The trainer with all of its callbacks, for a run that has done `done` steps."""
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
    reads = generation_rows(rows, options.window_size)
    trainer.add_callback(Generation(trainer, reads, passes, options.batch_size))
    if options.hard_warmup_steps:
        trainer.add_callback(HardEvictionWarmup(steps=options.hard_warmup_steps))
    if not trainer.is_fsdp_enabled:
        trainer.add_callback(NonFiniteGuard())
        trainer.add_callback(SleepMonitor(trainer))
    return trainer


def main(arguments: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    options = parse_arguments(arguments)
    complete(options)
    set_seed(options.seed)
    run = RunFolder(options.output, vars(options), options.resume)
    folder = run.path / "model"
    last, done = last_checkpoint(folder)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    task = GSMInfinite(tokenizer, ops=tuple(options.ops), tokens=tuple(options.tokens), window_size=options.window_size)
    rows = task.dataset(options.eval_problems, seed=options.seed, split="test")
    passes = options.eval_passes or [options.sleep_passes]
    budget = TimeBudget(options.minutes)
    trainer = make_trainer(options, run, task, rows, done, budget)
    train_on(trainer, last)
    if budget.stopped:
        if run.writes:
            print(budget.stopped)
        return {}
    # Evaluating before train() would leave the model unwrapped: DDP would not share gradients, and not say so.
    logged = {key: value for logs in trainer.state.log_history if logs["step"] == 0 for key, value in logs.items()}
    measured = {"before": logged, "after": trainer.evaluate()}
    results = {
        when: [score for n in passes for score in generation_scores(metrics, task, rows, n)]
        for when, metrics in measured.items()
    }
    size = options.batch_size * options.gradient_accumulation_steps * trainer.args.world_size
    trainer.model.card = CardFacts(
        f"{task}, made by hf_sleep; {options.steps} steps of {size} problems, question first, loss on the answer.",
        [{"task": "GSM-Infinite"} | score for score in by_difficulty(results["after"])],
    )
    trainer.save_model()  # and, with --push-to-hub, pushes
    if run.writes:
        write_file(run.path / "results.json", json.dumps(results, indent=1) + "\n")
        lines = {}
        for when, scores in results.items():
            for n in passes:
                mine = [score for score in scores if score["N"] == n]
                lines[f"{when}, N = {n}"] = by_difficulty(mine)
            lines[f"{when}, last window alone"] = by_difficulty(mine, "last_window")
        print(f"\n{table(lines, 'op')}\n\n{plot(run, lines, 'operations')}, {folder}")
    return results


if __name__ == "__main__":
    main()
