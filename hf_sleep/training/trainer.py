"""`SleepTrainer`: the Trainer with Muon and AdamW, accuracy by difficulty, and checks before anything is changed."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import (
    PreTrainedTokenizerBase,
    ProgressCallback,
    SchedulerType,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, get_last_checkpoint
from transformers.training_args import OptimizerNames

from ..checks import require_int
from ..compat import CHECKPOINTING
from ..data import Task
from ..files import write_file
from ..hub import write_model_card, write_remote_code
from ..lora import refuse_prompts
from ..modeling import SleepForCausalLM
from .collator import SleepCollator, without_unpredicted
from .evaluation import check_judged, judging
from .optimizer import GATE_LR, MuonAdamW, check_signature, parameter_groups
from .passing import PassedStates
from .progress import TokensPerSecond
from .records import SleepRecord, check_same_run
from .resuming import PublishedNames
from .rows import check_rows
from .schedules import DuringStep
from .windows import WindowsCurriculum

ADAMW = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
DECAY_SHARE = 0.1
TASK_FILE = "task.json"


@dataclass
class SleepTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the method's defaults: AdamW's betas (0.9, 0.95), weight decay 1e-4, warm-up over the
    first twentieth of the steps, then constant, then decay over the last tenth (`lr_scheduler_kwargs`'
    `num_decay_steps`), and `train_tokens_per_second` in the logs, which counts real tokens.

    `activation_checkpointing` (before transformers 5.23 `gradient_checkpointing`) recomputes a whole (window, pass) in
    the backward, by the model's own hook.

    Args:
        muon_learning_rate: of the hidden matrices; 2e-3 from scratch. `None`: AdamW for everything.
        gate_learning_rate: of what lies between two passes, such as a gate, which is not decayed. `None`: 1e-2. A gate
            moves by about its rate per step, and 5e-5 would never open it.
        backprop_windows: windows that gradients reach through: a row's graph is cut after every so many of its sleeps.
            `None`: all of them, as in the paper.
        eval_passes: each N to evaluate at too, after the config's own. Their metrics are named `eval_N1_loss`,
            `eval_N1_accuracy` and so on.
        pass_states: share of the optimizer steps whose rows begin with the fast weights that other rows ended with, in
            the batch before, instead of with none. With hard eviction and no sinks only.

    Source: Lee et al. 2026 (arXiv 2605.26099), experiments, for the learning rates; the rest is left open there.
    State passing: Buitrago and Gu 2025 (arXiv 2507.02782).
    """

    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 for AdamW."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of everything with two dimensions."})
    lr_scheduler_type: SchedulerType | str = field(
        default="warmup_stable_decay", metadata={"help": "The scheduler type to use."}
    )
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up: steps, or below 1 a share of them."})
    ddp_find_unused_parameters: bool | None = field(
        default=True, metadata={"help": "Let DDP look for parameters without a gradient, such as Ouro's exit gate."}
    )
    include_num_input_tokens_seen: str = field(
        default="non_padding", metadata={"help": "Which tokens to count: no, all or non_padding."}
    )
    muon_learning_rate: float | None = field(
        default=1e-3, metadata={"help": "Learning rate of the hidden matrices; None: AdamW for everything."}
    )
    gate_learning_rate: float | None = field(
        default=None, metadata={"help": f"Learning rate of what lies between two passes; None: {GATE_LR:g}."}
    )
    backprop_windows: int | None = field(
        default=None, metadata={"help": "Windows that gradients reach through; None: all."}
    )
    pass_states: float = field(
        default=0.0, metadata={"help": "Share of the steps whose rows begin with other rows' fast weights."}
    )

    eval_passes: list[int] | None = field(
        default=None, metadata={"help": "Each N to evaluate at too, after the config's own."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for passes in self.eval_passes or ():
            require_int("eval_passes: N", passes, 1)
        for name, otherwise in (("muon_learning_rate", "AdamW on everything"), ("gate_learning_rate", f"{GATE_LR:g}")):
            rate = getattr(self, name)
            if rate is not None and rate <= 0:
                raise ValueError(f"{name}={rate!r} must be above 0, or None for {otherwise}")
            if rate is not None and self.optim not in ADAMW:
                raise ValueError(
                    f"optim={self.optim.value!r} with {name}={rate}: "
                    f"that rate comes with torch's AdamW. Set {name}=None, or leave optim as it is"
                )
        if self.backprop_windows is not None and self.backprop_windows < 1:
            raise ValueError(f"backprop_windows={self.backprop_windows!r} must be at least 1, or None for all")
        if not 0 <= self.pass_states <= 1:
            raise ValueError(f"pass_states={self.pass_states!r} must be a share of the steps, from 0 to 1")


class SleepTrainer(PublishedNames):
    """`Trainer` for a `SleepForCausalLM`; takes the same arguments, and pads with a `SleepCollator` by default.

    `evaluate` adds, where the rows have a `difficulty`, exact-match accuracy by difficulty, teacher-forced: an answer
    counts when all its tokens have the largest logit. `accuracy` is the mean over difficulties; with `task`, `chance`
    stands beside it, and a row may hold several answers. Only predicted ids are kept of the logits, and every row is
    judged, in order and at the end, whatever the arguments say of the batches. With a `compute_metrics` of its own,
    evaluation is the Trainer's. With `eval_passes` all of it is repeated at each such N; callbacks are told of the
    config's own N alone. The task's settings are saved beside the model, in task.json. What it pushes to the Hub is
    complete, with the model's own card.

    Args:
        args: `SleepTrainingArguments`.
        task: what the evaluation rows come from.

    Raises:
        ValueError: by `train`, before anything is changed: rows that cannot be trained on, or a checkpoint of another
            model, sleep or schedule.
    """

    optimizer: Any
    control: Any
    compute_metrics: Any
    preprocess_logits_for_metrics: Any

    def __init__(
        self,
        model: Any = None,
        args: SleepTrainingArguments | None = None,
        data_collator: Any = None,
        *others: Any,
        task: Task | None = None,
        **kwargs: Any,
    ):
        if not isinstance(args, SleepTrainingArguments):
            raise TypeError(f"SleepTrainer needs SleepTrainingArguments as args, not {type(args).__name__}")
        self.task = task
        super().__init__(model, args, data_collator or SleepCollator(), *others, **kwargs)
        refuse_prompts(self.model)
        self.add_callback(SleepRecord(self.model))
        self._passed = PassedStates(args.pass_states, args.seed)
        if self.pop_callback(ProgressCallback):
            self.add_callback(TokensPerSecond())

    # Training.

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._check_saving()
        if self.train_dataset is not None:
            check_rows(self.train_dataset, self.data_collator, self.model)
        if self.args.eval_strategy != IntervalStrategy.NO:
            for rows in self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]:
                check_judged(self, rows)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        if resume_from_checkpoint and resume_from_checkpoint is not True:
            self._check_checkpoint(Path(resume_from_checkpoint))
        self._check_passing()
        self._passed = PassedStates(self.args.pass_states, self.args.seed)
        if self.args.world_size > 1 and self.accelerator._models == [self.model]:
            # An evaluation has prepared the bare model: left like this, every rank would train alone.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model._is_accelerate_prepared = False
            self.accelerator._models.clear()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            for callback in self._during_step():
                callback.restore()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled and self.args.muon_learning_rate is not None:
            raise ValueError(
                f"muon_learning_rate={self.args.muon_learning_rate}: "
                "DeepSpeed flattens the matrices that Muon needs. Set muon_learning_rate=None, or use FSDP2"
            )
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2 or self.args.fp16:
            raise ValueError(
                f"fsdp_version={plugin.fsdp_version}, fp16={self.args.fp16}: "
                "a sleeping model trains with FSDP2 only, in bf16 or fp32"
            )
        if plugin.activation_checkpointing:
            raise ValueError(
                "FSDP's activation_checkpointing=True would recompute a layer without the KV that it joins: "
                f"set the training argument {CHECKPOINTING}=True instead, which recomputes whole passes"
            )
        # Its casts would round the fast weights and their gates at every layer; autocast leaves both alone.
        plugin.mixed_precision_policy = MixedPrecisionPolicy()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        if self.is_fsdp_enabled and self.args.bf16:
            # A cache of casts would keep what FSDP frees.
            return torch.autocast(self.args.device.type, torch.bfloat16, cache_enabled=False)
        return super().autocast_smart_context_manager(cache_enabled)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self._optimizer_is_ours():
            args = self.args
            self.optimizer = MuonAdamW(
                parameter_groups(model or self.model, args.muon_learning_rate is not None),
                args.learning_rate,
                args.muon_learning_rate or 0.0,
                (args.adam_beta1, args.adam_beta2),
                args.adam_epsilon,
                args.weight_decay,
                fused=args.optim == OptimizerNames.ADAMW_TORCH_FUSED,
                gate_lr=GATE_LR if args.gate_learning_rate is None else args.gate_learning_rate,
            )
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        given = self.args.lr_scheduler_kwargs or {}
        if self.args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
            decay = {"num_decay_steps": math.ceil(DECAY_SHARE * num_training_steps)}
            self.args.lr_scheduler_kwargs = decay | given
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        finally:
            self.args.lr_scheduler_kwargs = given or None

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        # Before they are counted, whatever the collator.
        batches = (without_unpredicted(self._cut(batch)) for batch in epoch_iterator)
        return super().get_batch_samples(batches, num_batches, device)

    def _cut(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        for callback in self._during_step():
            if isinstance(callback, WindowsCurriculum):
                batch = callback.cut(batch, self.model.config.sleep.window_size, self.state.global_step)
        return batch

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if model.training and self.args.backprop_windows is not None:
            inputs = {**inputs, "backprop_windows": self.args.backprop_windows}
        if not (model.training and self.args.pass_states):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        rows = len(inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"])
        cache = self._passed.begin(rows, self.state.global_step)
        inputs = {**inputs, "cache": cache, "use_cache": False}
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._passed.end(self.model, cache)
        return loss

    def _optimizer_is_ours(self) -> bool:
        return self.optimizer is None and self.optimizer_cls_and_kwargs is None and self.args.optim in ADAMW

    def _during_step(self) -> list[DuringStep]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, DuringStep)]

    def _save(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        super()._save(output_dir, *args, **kwargs)
        if self.task is not None and self.args.should_save:
            file = Path(output_dir or self.args.output_dir) / TASK_FILE
            write_file(file, json.dumps(task_settings(self.task), indent=1) + "\n")

    # The Hub.

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        super().init_hf_repo(*args, **kwargs)
        if self.is_world_process_zero():
            write_remote_code(self.args.output_dir)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self.model, SleepForCausalLM):
            super().create_model_card(*args, **kwargs)  # an adapter's is PEFT's
        elif self.is_world_process_zero():
            write_model_card(self.model, self.args.output_dir, self.hub_model_id)

    # Checks.

    def _check_saving(self) -> None:
        if self.args.save_strategy == SaveStrategy.NO or not isinstance(self.model, SleepForCausalLM):
            return
        if self.model.quantizer is not None:
            raise ValueError(
                f"save_strategy={self.args.save_strategy.value!r}: a checkpoint would hold the base, and a quantised "
                "one cannot be written inside a sleep checkpoint. Set save_strategy='no' and call "
                "model.save_pretrained(folder, only_sleep=True) in the end, or train an adapter (sleep_lora_config), "
                "which is saved by itself"
            )

    def _check_passing(self) -> None:
        if not self.args.pass_states:
            return
        sleep, given = self.model.config.sleep, f"pass_states={self.args.pass_states}"
        if sleep.eviction != "hard" or sleep.num_sink_tokens:
            raise ValueError(
                f"{given} with eviction={sleep.eviction!r}, num_sink_tokens={sleep.num_sink_tokens}: a row would begin "
                "without the KV that a sleep leaves there. Set eviction='hard' and num_sink_tokens=0, or pass_states=0"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f"{given}: sharded weights are read in step, without a cache. Set pass_states=0, or use DDP"
            )

    def _check_checkpoint(self, folder: Path) -> None:
        """Check that this run is the one that wrote a checkpoint, before its weights are loaded over the model's."""
        check_same_run(folder, self.model, self._during_step())
        optimizer = folder / "optimizer.pt"
        if optimizer.is_file() and self._optimizer_is_ours():
            groups = parameter_groups(self.model, self.args.muon_learning_rate is not None)
            ours_signature = [(kind, name, tuple(p.shape)) for kind, named in groups.items() for name, p in named]
            check_signature(torch.load(optimizer, mmap=True, weights_only=True, map_location="cpu"), ours_signature)

    # Evaluation.

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        if self.is_fsdp_enabled and not self.accelerator._models:
            raise ValueError(
                "evaluate() before train() under FSDP: accelerate shards a model together with its optimizer only. "
                "Set eval_on_start=True, or evaluate in one process or under DDP"
            )
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
        with judging(self, rows, self.task):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            if not isinstance(rows, dict):  # of which each dataset is evaluated by a call of its own
                for passes in self.args.eval_passes or ():
                    metrics |= self._evaluate_at(passes, eval_dataset, ignore_keys, f"{metric_key_prefix}_N{passes}")
            return metrics

    def _evaluate_at(self, passes: int, eval_dataset: Any, ignore_keys: list[str] | None, prefix: str) -> Any:
        """Evaluate at another N; logged, but no evaluation to callbacks, which would generate and stop by it."""
        loss_only = True if self.compute_metrics is None else None
        with self.model.sleeping(sleep_passes=passes):
            loader = self.get_eval_dataloader(eval_dataset)
            metrics = self.evaluation_loop(loader, "Evaluation", loss_only, ignore_keys, prefix).metrics
        self.log(metrics)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return metrics

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, without_unpredicted(inputs), *args, **kwargs)

    def _get_eval_sampler(self, eval_dataset: Any) -> None:
        # In order, whatever the training strategy: predictions are matched with rows by their place.
        return None


def task_settings(task: Task) -> dict[str, Any]:
    """The class and the fields of a task, as JSON has them; without a tokenizer, which is saved beside the model."""
    kind: Any = type(task)
    fields = {f.name: getattr(task, f.name) for f in dataclasses.fields(kind) if f.init}
    plain = {name: v for name, v in fields.items() if not isinstance(v, PreTrainedTokenizerBase)}
    return {"task": type(task).__name__} | json.loads(json.dumps(plain))
