"""Trains tiny models as one of several processes; `test_distributed.py` launches it and runs the same cases in one.

accelerate launch --config_file recipes/accelerate/cpu.yaml tests/distributed_run.py ddp FOLDER
python -m torch.distributed.run --nproc-per-node 2 tests/distributed_run.py fsdp FOLDER
"""

import json
import os
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from families import make_model, sleep_config, tokens
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback

from hf_sleep.compat import CHECKPOINTING
from hf_sleep.state import fingerprint
from hf_sleep.training import (
    Distillation,
    DistillationTrainer,
    SleepCollator,
    SleepPassesSchedule,
    SleepTrainer,
    SleepTrainingArguments,
    SpikeGuard,
)

RAGGED = (25, 5, 14, 9, 20, 3, 6, 11)
SLIDING = {"eviction": "sliding", "num_sink_tokens": 1}
DISTILLED = {"lengths": RAGGED, "distillation": Distillation(top_k=5, recurring_weight=3.0, recurring_tokens=1)}
GUARDED = {"lengths": RAGGED, "spike_factor": 1.001, "max_steps": 6}
SAVING = {"save_strategy": "steps", "save_steps": 2}

DDP = {
    "sleep_trainer": {},
    "plain_trainer": {"plain": True},
    "checkpointing": {CHECKPOINTING: True},
    "plain_checkpointing": {"plain": True, CHECKPOINTING: True},
    "ouro": {"family": "ouro"},
    "ouro_checkpointing": {"family": "ouro", CHECKPOINTING: True},
    "hybrid": {"family": "qwen3_5", "sleep": SLIDING},
    "ragged": {"lengths": RAGGED},
    "answers": {"lengths": RAGGED, "answers_only": True},
    "all_labels_left": {
        "lengths": RAGGED,
        "padding_side": "left",
        "all_labels": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
    },
    "muon": {"muon_learning_rate": 1e-2},
    "schedule": {"drawn_passes": True},
    "spikes": GUARDED,
    "distilled": DISTILLED,
    "evaluated_first": {"evaluate_first": True},
    "evaluated_first_in_bf16": {"evaluate_first": True, "bf16": True, "dtype": torch.float32, "max_steps": 1},
    "saved": SAVING,
    "resumed": SAVING | {"resume": "saved"},
}
MUON = {"muon_learning_rate": 1e-2, "exact_muon": True}
FSDP = {
    "sleep_trainer": {},
    "plain_trainer": {"plain": True},
    "checkpointing": {CHECKPOINTING: True},
    "sliding": {"sleep": SLIDING},
    "sliding_checkpointing": {"sleep": SLIDING, CHECKPOINTING: True},
    "tied": {"family": "qwen3", "lengths": RAGGED},
    "ouro": {"family": "ouro", "lengths": RAGGED, CHECKPOINTING: True},
    "hybrid": {"family": "qwen3_5", "sleep": SLIDING, "lengths": RAGGED},
    "hybrid_checkpointing": {"family": "qwen3_next", CHECKPOINTING: True},
    "jet": {"family": "jet_nemotron", "sleep": SLIDING},
    "ragged_loop": {"lengths": RAGGED, "answers_only": True, "sleep": {"loop_layers": (1, 3)}, "evaluate": True},
    "ragged_left": {"lengths": RAGGED, "padding_side": "left", "backprop_windows": 2},
    "accumulation": {"lengths": RAGGED, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "schedule": {"drawn_passes": True},
    "spikes": GUARDED,
    "distilled": DISTILLED,
    "bf16": {"dtype": torch.float32, "bf16": True, "max_steps": 1},
    "saved": SAVING | MUON,
    "resumed": SAVING | MUON | {"resume": "saved"},
}
STEPS = 3


def rows(lengths, answers_only=False):
    """Rows of these lengths in turn; with `answers_only`, only two tokens of a row have labels, and of some none."""
    made = []
    for i in range(24):
        ids = tokens(lengths[i % len(lengths)], seed=i + 1).tolist()
        labels = [-100] * (len(ids) - 2) + ids[-2:] if answers_only else ids
        if answers_only and i % 5 == 0:
            labels = [-100] * len(ids)
        made.append({"input_ids": ids, "labels": labels})
    return made


class AllLabels(SleepCollator):
    """Label as transformers' DataCollatorForLanguageModeling does: a row's first token has a label, too."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


class Recorder(TrainerCallback):
    """N of every step, as the model had it."""

    def __init__(self):
        self.passes = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.passes.append(model.config.sleep.sleep_passes)


def sharded(args, **settings):
    """Arguments for FSDP2, which accelerate leaves out where the processes run on CPUs: they pass for GPUs."""
    config = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True}
    made = SleepTrainingArguments(**args, fsdp=True, fsdp_config=config | settings)
    assert made.world_size == 2
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return made


def make_trainer(folder, fsdp=False, **case):
    """A trainer for a case, with a global batch of 4 rows however many processes share it."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    case = {
        "family": "llama",
        "sleep": {},
        "dtype": torch.float64,
        "lengths": (14,),
        "answers_only": False,
        "plain": False,
        "padding_side": "right",
        "drawn_passes": False,
        "all_labels": False,
        "per_device_train_batch_size": 2,
    } | case
    own = {key: case.pop(key) for key in ("family", "sleep", "dtype", "lengths", "answers_only", "plain")}
    padding_side, drawn = case.pop("padding_side"), case.pop("drawn_passes")
    spike_factor, distillation = case.pop("spike_factor", None), case.pop("distillation", None)
    collator = AllLabels if case.pop("all_labels") else SleepCollator
    case["per_device_train_batch_size"] *= 2 // world
    args = {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "ddp_timeout": 60,
        "per_device_eval_batch_size": 4 // world,
    } | case
    data = rows(own["lengths"], own["answers_only"])
    model = make_model(own["family"], sleep_config(own["family"], **{"sleep_passes": 2} | own["sleep"]), own["dtype"])
    recorder = Recorder()
    given = {
        "data_collator": collator(padding_side),
        "train_dataset": data,
        "eval_dataset": rows(own["lengths"])[:8],
        "callbacks": [SleepPassesSchedule(1, 4, seed=1)] * drawn + [recorder],
    }
    args.setdefault("muon_learning_rate", None)
    if own["plain"]:
        args["ddp_find_unused_parameters"] = None  # as in TrainingArguments
    arguments = sharded(args) if fsdp else SleepTrainingArguments(**args)
    if distillation is not None:
        trainer = DistillationTrainer(model, arguments, **given, distillation=distillation)
    else:
        trainer = (Trainer if own["plain"] else SleepTrainer)(model, arguments, **given)
    if spike_factor is not None:
        trainer.add_callback(SpikeGuard(trainer, spike_factor, window=1))
    return trainer, recorder


def run(folder, fsdp=False, resume=None, exact_muon=False, evaluate=False, evaluate_first=False, **case):
    """Train a case; what happened, the final weights of all ranks together, and the trainer."""
    trainer, recorder = make_trainer(folder, fsdp, **case)
    if evaluate_first:
        trainer.evaluate()
    # Newton-Schulz runs in bfloat16, where another order of sums shows.
    precise = mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.double) if exact_muon else nullcontext()
    with precise:
        trainer.train(resume_from_checkpoint=str(folder.parent / resume / "checkpoint-2") if resume else None)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "loss": [entry["loss"] for entry in logs],
        "grad_norm": [entry["grad_norm"] for entry in logs],
        "passes": recorder.passes,
        "skipped": [entry["skipped_steps"] for entry in trainer.state.log_history if "skipped_steps" in entry],
        "eval_loss": trainer.evaluate()["eval_loss"] if evaluate else None,
    }
    return result, trainer.accelerator.get_state_dict(trainer.model_wrapped), trainer


def refusals(folder):
    """Check what cannot be done with sharded weights, and the messages that say so."""

    def message(action):
        try:
            action()
        except ValueError as error:
            return str(error)
        return "no error"

    trainer, _ = make_trainer(folder / "refusals", fsdp=True, max_steps=1)
    evaluation = message(trainer.evaluate)
    trainer.train()
    model = trainer.model
    model.config.base_model_name_or_path = "somewhere"
    messages = {
        "evaluation": evaluation,
        "fingerprint": message(lambda: fingerprint(model)),
        "only_sleep": message(lambda: model.save_pretrained(folder / "only_sleep", only_sleep=True)),
        "whole": message(lambda: model.save_pretrained(folder / "whole")),
    }
    arguments = sharded({"output_dir": str(folder / "refusals"), "use_cpu": True}, **{CHECKPOINTING: True})
    messages["own_checkpointing"] = message(lambda: SleepTrainer(make_model("llama", sleep_config("llama")), arguments))
    plain, _ = make_trainer(folder / "refusals", fsdp=True, max_steps=1, plain=True, bf16=True, dtype=torch.float32)
    messages["casts"] = message(plain.train)
    return messages


def recipe(folder):
    """A recipe, sharded: it must train, evaluate and save."""
    sys.path.append(str(Path(__file__).parents[1] / "recipes"))
    from_scratch, train_khop = import_module("shared.from_scratch"), import_module("train_khop")
    options = ["--steps", "2", "--batch-size", "4", "--test-rows", "16", "--evaluations", "1", "--sleep-passes", "2"]
    with mock.patch.object(
        from_scratch, "SleepTrainingArguments", lambda **args: sharded(args, state_dict_type="FULL_STATE_DICT")
    ):
        train_khop.main([*options, "--output", str(folder)])


def main():
    kind, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    results: dict = {"units": []}
    for name, case in {"ddp": DDP, "fsdp": FSDP}[kind].items():
        print(f"rank {rank}: {name}", flush=True)
        results[name], weights, trainer = run(folder / name, fsdp=kind == "fsdp", **case)
        units = {type(m).__name__.removeprefix("FSDP") for m in trainer.model.modules() if isinstance(m, FSDPModule)}
        results["units"] = sorted(units.union(results["units"]))
        if name == "saved":
            trainer.save_model(folder / "model")
        if rank == 0:
            torch.save(weights, folder / f"{name}.pt")
    if kind == "fsdp":
        results["refusals"] = refusals(folder)
        recipe(folder / "recipe")
    (folder / f"rank{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
