"""Small hybrids from scratch, one per seed and N, trained alike and compared, for all task recipes."""

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback, set_seed

from hf_sleep import SleepConfig, SleepForCausalLM, default_dtype
from hf_sleep.data.task import Row, Task
from hf_sleep.files import write_file
from hf_sleep.hub import CardFacts
from hf_sleep.training import SleepTrainer, SleepTrainingArguments

from .arguments import InParts, argument, require_pair
from .run_folder import RunFolder, TimeBudget, last_checkpoint, mean_and_spread, train_on


def hybrid(
    vocab_size: int,
    window_size: int,
    sleep_passes: int,
    *,
    layers: int = 1,
    hidden_size: int = 64,
    heads: int = 2,
    block_kind: str = "gated_delta_net",
    decay: tuple[float, float] = (0.02, 0.2),
    between: str = "none",
    decay_once: bool = False,
    seed: int = 0,
) -> SleepForCausalLM:
    """`layers` times Llama's attention and MLP, then a fast-weight block without an MLP; all of them loop in sleep.

    Args:
        vocab_size: of the task.
        window_size: L, in tokens.
        sleep_passes: N.
        layers: attention layers; as many blocks.
        hidden_size: C; the MLP is 2 C wide.
        heads: of attention and of each block, with K = V = C / heads.
        block_kind: `"gated_delta_net"` or `"jet"`.
        decay: the range of A at first: a token's writing leaves exp(-0.7 A) of what was there, more or less.
        between: what happens between two passes, `"none"` or `"gate"`.
        decay_once: passes 2 to N do not decay.
        seed: of the weights.
    """
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max(512, 2 * window_size),
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    sleep = SleepConfig(
        window_size=window_size,
        sleep_passes=sleep_passes,
        loop_layers=(0, layers),
        block_kind=block_kind,
        block_layers=tuple(range(layers)),
        block_num_heads=heads,
        block_head_dim=hidden_size // heads,
        block_expand_v=1.0,
        between=between,
        decay_once=decay_once,
    )
    model = SleepForCausalLM.from_base(LlamaForCausalLM(config), sleep)
    for block in model.fast_weights.values():
        block.init_weights(config.initializer_range)  # from the seed: a retrofit's follow from its base
    initialise(model, decay)
    return model


@torch.no_grad()
def initialise(model: SleepForCausalLM, decay: tuple[float, float]) -> None:
    """Weights for training from nothing, where a block need not start at zero.

    Matrices get a standard deviation of 0.7 / sqrt(inputs), those that write to the residual stream half of that, the
    embedding 0.5, the head 0.02. The fast weights decay slowly at first (A uniform in `decay`).
    """
    for name, parameter in model.named_parameters():
        if "conv" in name:
            continue
        if name.endswith("A_log"):
            parameter.uniform_(*decay).log_()
        elif name.endswith("dt_bias"):
            parameter.zero_()
        elif "embed_tokens" in name:
            parameter.normal_(std=0.5)
        elif "lm_head" in name:
            parameter.normal_(std=0.02)
        elif parameter.ndim == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            parameter.normal_(std=(0.35 if writes else 0.7) / math.sqrt(parameter.shape[1]))


@dataclass
class Comparison(InParts):
    """The arguments of all task recipes."""

    sleep_passes: list[int] = argument([1, 2, 3], "N of each model")
    eval_passes: list[int] = argument([], "evaluate each model at these N too")
    seeds: list[int] = argument([0], "a model of each N is trained from each")
    steps: int = argument(1000, "optimizer steps of each model")
    layers: int = argument(1, "attention layers, each with a block after it")
    hidden_size: int = argument(64, "C, the width")
    heads: int = argument(2, "of attention and of each block")
    block_kind: Literal["gated_delta_net", "jet"] = argument("gated_delta_net", "what the blocks are")
    decay: list[float] = argument([0.02, 0.2], "range of A at first")
    between: Literal["none", "gate"] = argument("none", "what happens between two passes")
    decay_once: bool = argument(False, "passes 2 to N leave what earlier windows wrote as it is")
    batch_size: int = argument(128, "rows that a process reads at once")
    muon_learning_rate: float = argument(0.02, "of the matrices; 0: AdamW for everything")
    learning_rate: float = argument(0.01, "of AdamW, for all that Muon does not take")
    test_rows: int = argument(1024, "rows to evaluate on")
    evaluations: int = argument(8, "during each training")
    threads: int = argument(1, "of this process; two processes of one thread beat one of two")
    output: Path = argument(Path("runs/from_scratch"), "a folder")

    def __post_init__(self) -> None:
        require_pair("decay", self.decay)

    def training_rows(self, task: Task, seed: int, done: int, rows_per_step: int) -> IterableDataset:
        """The rows that are trained on after `done` optimizer steps, without end."""
        return task.stream(seed=seed, start=done * rows_per_step)

    def said(self, task: Task, processes: int) -> str:
        """What the models are trained on, for their cards and results.json."""
        return f"{task}, {self.steps} steps of {self.batch_size * processes} rows"


def staged(stages: tuple[tuple[Task, int], ...], seed: int, done: int, rows_per_step: int) -> IterableDataset:
    """The rows of tasks in turn, each for so many optimizer steps: row i is row i of the task of its step.

    Args:
        stages: tasks and steps; the last task's rows never end.
        seed: of the rows.
        done: steps that are over.
        rows_per_step: rows in a step, of all processes together.
    """
    kwargs = {"stages": stages, "seed": seed, "start": done * rows_per_step, "rows_per_step": rows_per_step}
    return IterableDataset.from_generator(_staged, gen_kwargs=kwargs)


def _staged(stages: tuple[tuple[Task, int], ...], seed: int, start: int, rows_per_step: int) -> Iterator[Row]:
    end = 0
    for task, steps in stages[:-1]:
        end += steps * rows_per_step
        if start < end:
            yield from islice(task.stream(seed=seed, start=start), end - start)
            start = end
    yield from stages[-1][0].stream(seed=seed, start=start)


class ProgressLine(TrainerCallback):
    """Prints a line per evaluation: where training is, and accuracy by difficulty."""

    def __init__(self, label: str, difficulty: str):
        self.label, self.difficulty, self.began, self.last = label, difficulty, time.monotonic(), -1

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.last or not state.is_world_process_zero:
            return  # the same model at other N, or another rank's turn to print
        self.last = state.global_step
        scores = "  ".join(f"{self.difficulty}={d} {score:.2f}" for d, score in by_difficulty(metrics).items())
        seconds = time.monotonic() - self.began
        print(f"{self.label}  step {state.global_step:>5}/{state.max_steps}  {seconds:4.0f} s  {scores}", flush=True)


class Tagged(TrainerCallback):
    """Writes a model's logs to the run's metrics under its name."""

    def __init__(self, run: RunFolder, name: str):
        self.run, self.name = run, name

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.run.record(model=self.name, step=state.global_step, **logs)


def by_difficulty(metrics: dict[str, float]) -> dict[int, float]:
    """Accuracy by difficulty out of what `SleepTrainer.evaluate` returns."""
    prefix = "eval_accuracy_"
    return {int(key.removeprefix(prefix)): value for key, value in metrics.items() if key.startswith(prefix)}


def training_arguments(options: Comparison, folder: Path, seed: int) -> SleepTrainingArguments:
    return SleepTrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        muon_learning_rate=options.muon_learning_rate or None,
        learning_rate=options.learning_rate,
        weight_decay=0.0,
        warmup_steps=50,
        lr_scheduler_kwargs={"num_decay_steps": int(0.4 * options.steps)},
        eval_strategy="steps",
        eval_steps=max(1, options.steps // options.evaluations),
        logging_steps=max(1, options.steps // 20),
        save_strategy="no",
        save_total_limit=1,
        # The stream begins where the checkpoint was written.
        ignore_data_skip=True,
        report_to=[],
        disable_tqdm=True,
        # Where there is no accelerator: without it, processes on CPUs would each train alone.
        use_cpu=not torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
        bf16=torch.accelerator.is_available() and default_dtype() == torch.bfloat16,
        dataloader_pin_memory=torch.accelerator.is_available(),
        seed=seed,
    )


def train(options: Comparison, task: Task, passes: int, seed: int, run: RunFolder, difficulty: str) -> dict | None:
    """One model: its accuracy by difficulty, at its own N and at the others asked for, and the seconds it took.

    It continues from its last checkpoint, if there is one. `None`: the minutes were used up before it was evaluated.
    """
    name, label = f"N{passes}-seed{seed}", f"N = {passes}, seed {seed}"
    folder = run.path / name
    last, done = last_checkpoint(folder)
    names = ("layers", "hidden_size", "heads", "block_kind", "decay", "between", "decay_once")
    shape = {key: getattr(options, key) for key in names}
    model = hybrid(task.vocab_size, task.window_size, passes, **shape, seed=seed)
    arguments, budget = training_arguments(options, folder, seed), TimeBudget(options.minutes)
    trainer = SleepTrainer(
        model,
        arguments,
        train_dataset=options.training_rows(task, seed, done, options.batch_size * arguments.world_size),
        eval_dataset=task.dataset(options.test_rows, seed=1, split="test"),
        task=task,
        callbacks=[ProgressLine(label, difficulty), Tagged(run, name), budget],
    )
    trainer.remove_callback(PrinterCallback)
    began = time.monotonic()
    train_on(trainer, last)
    run.record(model=name, step=trainer.state.global_step, seconds=time.monotonic() - began)
    if budget.stopped:
        if run.writes:
            print(f"{label}: {budget.stopped}", flush=True)
        return None
    scores = evaluate(trainer, passes, options.eval_passes)
    model.card = card(options, task, scores, trainer.eval_dataset, arguments.world_size)
    trainer.save_model()
    return {
        "data": options.said(task, arguments.world_size),
        "sleep_passes": passes,
        "between": options.between,
        "decay_once": options.decay_once,
        "seed": seed,
        "seconds": run.seconds(name),
        "accuracy": scores,
    }


def evaluate(trainer: SleepTrainer, passes: int, others: list[int]) -> dict[int, dict[int, float]]:
    """Accuracy by difficulty, at the model's own N and at others."""
    scores = {passes: by_difficulty(trainer.evaluate())}
    for other in others:
        with trainer.model.sleeping(sleep_passes=other):
            scores[other] = by_difficulty(trainer.evaluate())
    return scores


def card(
    options: Comparison, task: Task, scores: dict[int, dict[int, float]], test: Dataset, processes: int
) -> CardFacts:
    """Facts for the model's card: data, results and use."""
    usage = f"""import torch
from hf_sleep.data import {type(task).__name__}

task = {task}
row = task.example(7, "test")
said = model(torch.tensor([row["input_ids"]])).logits[0].argmax(-1)
print(task.score(said.tolist(), row))  # difficulty and whether it is right, for every answer
"""
    counts = Counter(difficulty for row in test for difficulty, _ in task.answers(row))
    metrics = [
        {
            "task": type(task).__name__,
            "difficulty": d,
            "N": n,
            "accuracy": score,
            "chance": task.chance(d),
            "n": counts[d],
        }
        for n, accuracy in scores.items()
        for d, score in accuracy.items()
    ]
    return CardFacts(f"{options.said(task, processes)}.", metrics, usage)


def table(results: list[dict], task: Task, difficulty: str) -> str:
    """Markdown: accuracy by difficulty at each model's own N, and the seconds it took; mean±deviation over seeds."""
    levels = list(task.difficulties)
    lines = ["| N | seconds | " + " | ".join(f"{difficulty}={d}" for d in levels) + " |"]
    lines.append("|---" * (2 + len(levels)) + "|")
    for passes in sorted({result["sleep_passes"] for result in results}):
        mine = [result for result in results if result["sleep_passes"] == passes]
        seconds = sum(result["seconds"] for result in mine) / len(mine)
        cells = [mean_and_spread([result["accuracy"][passes][d] for result in mine]) for d in levels]
        lines.append(f"| {passes} | {seconds:.0f} | " + " | ".join(cells) + " |")
    lines.append(f"| chance | | {' | '.join(f'{task.chance(d):.2f}' for d in levels)} |")
    return "\n".join(lines)


def finished(file: Path) -> list[dict]:
    """Read what an earlier run wrote to results.json, with N and difficulties as numbers, which JSON's keys are not."""
    if not file.exists():
        return []
    return json.loads(
        file.read_text(encoding="utf-8"), object_hook=lambda d: {int(k) if k.isdigit() else k: v for k, v in d.items()}
    )


def compare(options: Comparison, task: Task, difficulty: str) -> list[dict]:
    """Train a model per seed and N, as far as the minutes go; print and write a table, a plot and every model."""
    torch.set_num_threads(options.threads)
    run = RunFolder(options.output, vars(options), options.resume)
    file = run.path / "results.json"
    results = finished(file)
    done = [(result["seed"], result["sleep_passes"]) for result in results]
    for seed, passes in product(options.seeds, options.sleep_passes):
        if (seed, passes) in done:
            continue
        result = train(options, task, passes, seed, run, difficulty)
        if result is None:
            break
        results.append(result)
        if run.writes:
            write_file(file, json.dumps(results, indent=1) + "\n")
            for checkpoint in (run.path / f"N{passes}-seed{seed}").glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
    if not results or not run.writes:
        return results
    scores: dict[str, dict[int, list[float]]] = {}
    for result in results:
        line = scores.setdefault(f"N = {result['sleep_passes']}", {})
        for level, score in result["accuracy"][result["sleep_passes"]].items():
            line.setdefault(level, []).append(score)
    plot = run.plot(scores, {d: task.chance(d) for d in task.difficulties}, difficulty)
    print(f"\n{table(results, task, difficulty)}\n\n{plot}")
    return results
