# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-sleep[train]"]
#
# [tool.uv.sources]
# hf-sleep = { path = "..", editable = true }
# ///
"""Train a model's fast-weight blocks through sleep on a text, with the plain Trainer.

python recipes/finetune_text.py                                   # SmolLM2 as `make demo` left it, Python's docs
python recipes/finetune_text.py --model Qwen/Qwen3-0.6B --text book.txt --sleep-passes 4
accelerate launch recipes/finetune_text.py --steps 500

Next-token loss on every window; a sample is several windows long, and all but the last of them sleep. The defaults take
a few minutes on two CPU cores and are a start, not a result: they are far too few steps to teach a model to remember.
"""

import math
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from shared.arguments import argument, parse
from shared.finetuning import complete
from transformers import AutoTokenizer, Trainer, TrainingArguments, default_data_collator, set_seed

from hf_sleep import AutoModelForSleepLM, SleepForCausalLM
from hf_sleep.training import freeze_all_but_fast_weights


@dataclass
class Arguments:
    model: str = argument(".demo/SmolLM2-135M-Instruct", "Hub id or folder, of a base or of a model that sleeps")
    text: Path | None = argument(None, "text file; None: Python's language reference, from pydoc")
    steps: int = argument(20, "optimizer steps")
    batch_size: int = argument(2, "samples that a process reads at once")
    learning_rate: float | None = argument(None, "of AdamW; None: 1e-3, with --whole-model 5e-5")
    window_size: int | None = argument(None, "L, in tokens; None: 128, or as the checkpoint was trained")
    windows: int = argument(4, "windows per sample")
    sleep_passes: int | None = argument(None, "N; None: 2, or as the checkpoint was trained")
    eviction: str | None = argument(
        None, "what becomes of the KV; None: hard, or as the checkpoint was trained", choices=("hard", "sliding")
    )
    between: str | None = argument(None, "step between passes: none or gate; None: the base's, with --whole-model none")
    whole_model: bool = argument(False, "train the base too, not just the new blocks")
    checkpointing: bool = argument(False, "recompute passes in the backward, to save memory")
    output: Path = argument(Path("runs/finetune_text"), "a folder")


def samples(tokenizer: object, path: Path | None, length: int) -> Dataset:
    """The text cut into samples of `length` tokens; the last twentieth is for evaluation."""
    text = path.read_text(encoding="utf-8") if path else "\n\n".join(pydoc_data.topics.topics.values())
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    rows = ids[: len(ids) // length * length].view(-1, length)
    if len(rows) < 20:
        raise SystemExit(
            f"the text has {len(ids)} tokens: 20 samples of {length} are needed. Pass --windows or --window-size"
        )
    rows = rows.tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows}).train_test_split(0.05, shuffle=False)


def main(arguments: list[str] | None = None) -> None:
    options = parse(Arguments, __doc__, arguments)
    # Where all of the model is trained, a gate between the passes is in the way.
    complete(options, window_size=128, **({"between": "none"} if options.whole_model else {}))
    set_seed(0)
    sleep = {name: getattr(options, name) for name in ("window_size", "sleep_passes", "eviction", "between")}
    model: SleepForCausalLM = AutoModelForSleepLM.from_pretrained(
        options.model,
        sleep={name: value for name, value in sleep.items() if value is not None},
        dtype="float32",
    )
    if not options.whole_model:
        freeze_all_but_fast_weights(model)
    model.gradient_checkpointing = options.checkpointing
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = samples(tokenizer, options.text, options.window_size * options.windows)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            learning_rate=options.learning_rate or (5e-5 if options.whole_model else 1e-3),
            warmup_steps=max(1, options.steps // 10),
            max_grad_norm=1.0,
            logging_steps=max(1, options.steps // 10),
            save_strategy="no",
            report_to="none",
            prediction_loss_only=True,
            # Before train() wraps the model, an evaluation would leave it unwrapped: processes would train alone.
            eval_on_start=True,
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.accelerator.is_available(),
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"].select(range(min(16, len(data["test"])))),
        data_collator=default_data_collator,
    )
    trainer.train()
    before = next(logs["eval_loss"] for logs in trainer.state.log_history if "eval_loss" in logs)
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    tokenizer.save_pretrained(options.output)
    if trainer.is_world_process_zero():
        print(f"held-out perplexity: {math.exp(before):.2f} before, {math.exp(after):.2f} after {options.steps} steps")
        print(f"saved to {options.output}; load it with AutoModelForSleepLM.from_pretrained")


if __name__ == "__main__":
    main()
