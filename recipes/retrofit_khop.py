# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-sleep[train]"]
#
# [tool.uv.sources]
# hf-sleep = { path = "..", editable = true }
# ///
"""k-hop, retrofitted: which layers should loop, and what between passes, in a model that was pre-trained without loops?

python recipes/retrofit_khop.py                                     # seed 0 of everything: under an hour on one thread
python recipes/retrofit_khop.py --seeds 0 1 2                       # continues with the other seeds
python recipes/retrofit_khop.py --sleep-passes 1 --steps 1500       # N = 1 for longer than N = 4 takes

A plain decoder is pre-trained, with full attention and without sleep, to answer questions about facts that it sees, up
to three hops away (--base keeps it). Then it is given two fast-weight blocks and sleeps: it reads the facts in one
window, which is dropped, and is asked in the next. Every arm has as many blocks, the same data and as many steps. Each
run writes one JSON into --output: accuracy at its own N, at others and from the last window alone, the norms of its
gradients, and the seconds of processor time that training took. What is there already is not run again.
"""

import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from datasets import IterableDataset
from shared.arguments import argument, parse
from shared.from_scratch import initialise
from shared.run_folder import mean_and_spread
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback, set_seed

import hf_sleep
from hf_sleep import SleepConfig, SleepForCausalLM
from hf_sleep.data import KHopText
from hf_sleep.engine.slots import Recurrence
from hf_sleep.files import write_file
from hf_sleep.state import fingerprint
from hf_sleep.training import (
    MuonAdamW,
    SleepTrainer,
    SleepTrainingArguments,
    freeze_all_but_fast_weights,
    parameter_groups,
)


@dataclass(frozen=True)
class Arm:
    """A way to retrofit.

    Args:
        loop: which layers loop: "all", or the "middle" half.
        blocks: over which layers the blocks are spread: "all", or the "middle" half.
        between: what lies between two passes.
        carries: whether a pass continues the fast weights of the pass before, as the paper's does. Otherwise each
            starts from those that the window began with, so that only the last one's writing is left.
    """

    loop: str
    blocks: str
    between: str = "none"
    carries: bool = True


ARMS = {
    "all": Arm("all", "all"),
    "all-gate": Arm("all", "all", "gate"),
    "all-blocks-middle": Arm("all", "middle"),
    "middle": Arm("middle", "middle"),
    "middle-gate": Arm("middle", "middle", "gate"),
    "middle-reset": Arm("middle", "middle", carries=False),
}
RATES = {"blocks": (6e-2, 1e-2), "whole": (2e-2, 1e-2)}
STAGES = (
    ((5, (1,)), (5, (1, 2)), (8, (1, 2)), (8, (1, 2, 3))),
    ((6, (2, 3)), (8, (1, 2, 3))),
)
"""Of the pre-training, in two phases: nodes and hops. Short cycles are learnt soonest."""
BASE_RATES = ((2e-2, 1e-2), (1e-2, 5e-3))
LEARNT = 0.95
"""Accuracy at its deepest hop that ends a stage of the pre-training."""


@dataclass
class Arguments:
    base: Path = argument(Path("runs/retrofit_khop_base"), "folder of the base; made where missing")
    num_names: int = argument(8, "names, and the longest cycle that the base learns")
    num_nodes: int = argument(6, "n, the length of the cycles that are slept on")
    hops: list[int] = argument([1, 2, 3], "k, of what is slept on")
    layers: int = argument(8, "of the base")
    hidden_size: int = argument(64, "C, of the base")
    pretrain_steps: list[int] = argument([1500, 1100], "optimizer steps of the base, in two phases")
    arms: list[str] = argument(["all", "middle", "middle-gate"], f"which layers loop, and how: {', '.join(ARMS)}")
    train: list[str] = argument(list(RATES), "what is trained: blocks (and what lies between passes), or the whole")
    sleep_passes: list[int] = argument([1, 2, 4], "N of each model")
    eval_passes: list[int] = argument([1, 2, 4], "evaluate each model at these N too")
    seeds: list[int] = argument([0], "of the blocks and the rows; the base is always the same")
    block_kind: str = argument("gated_delta_net", "what the blocks are")
    steps: int = argument(600, "optimizer steps of each model")
    batch_size: int = argument(16, "rows")
    muon_learning_rate: float | None = argument(
        None, f"of the matrices; 0: AdamW for everything; None: {RATES['blocks'][0]}, whole less"
    )
    learning_rate: float | None = argument(None, f"of all else; None: {RATES['blocks'][1]}, whole less")
    test_rows: int = argument(128, "rows to evaluate on")
    threads: int = argument(1, "of this process")
    output: Path = argument(Path("runs/retrofit_khop"), "a folder")

    def __post_init__(self) -> None:
        for name, known in (("arms", ARMS), ("train", RATES)):
            if unknown := set(getattr(self, name)) - set(known):
                raise ValueError(f"--{name} {min(unknown)}: it takes some of {', '.join(known)}")


def batch(task: KHopText, seed: int, split: str, indices: range) -> dict[str, torch.Tensor]:
    """Rows as tensors, `[B, T]` int64."""
    rows = task.rows(seed, split, indices)
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


@torch.no_grad()
def accuracy(model: Any, task: KHopText, count: int, skip: int = 0, **how: Any) -> dict[int, float]:
    """Share of right answers by k on `count` test rows, without their first `skip` tokens."""
    model.eval()
    right = defaultdict(list)
    for start in range(0, count, 64):
        rows = task.rows(1, "test", range(start, min(start + 64, count)))
        ids = torch.tensor([row["input_ids"] for row in rows])
        said = model(ids[:, skip:], **how).logits.argmax(-1).tolist()
        for row, tokens in zip(rows, said, strict=True):
            for k, hit in task.score([0] * skip + tokens, row):
                right[k].append(hit)
    return {k: sum(hits) / len(hits) for k, hits in sorted(right.items())}


def pretrained(options: Arguments) -> LlamaForCausalLM:
    """The base from its folder; where there is none, trained and saved there."""
    if not (options.base / "config.json").exists():
        pretrain(options)
    base = LlamaForCausalLM.from_pretrained(options.base, dtype="float32")
    asked = {
        "num_hidden_layers": options.layers,
        "hidden_size": options.hidden_size,
        "vocab_size": KHopText(options.num_names).vocab_size,
    }
    refuse_others(options.base, asked, base.config.to_dict())
    return base


def refuse_others(path: Path, asked: dict[str, Any], found: dict[str, Any]) -> None:
    """Leave where what an earlier run wrote has other settings than are asked for; older files say less."""
    if differing := {key: (found[key], value) for key, value in asked.items() if found.get(key, value) != value}:
        raise SystemExit(f"{path} was made with other settings, {differing} (then, now): choose another folder")


def pretrain(options: Arguments) -> None:
    """Teach a plain decoder to answer while it sees the facts, in phases of ever more hops."""
    set_seed(0)
    task = KHopText(options.num_names)
    config = LlamaConfig(
        vocab_size=task.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=2 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=False,
        initializer_range=options.hidden_size**-0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    initialise(model, (1.0, 1.0))
    curve = []
    for phase, (stages, steps) in enumerate(zip(STAGES, options.pretrain_steps, strict=True)):
        tasks = [KHopText(min(nodes, options.num_names), hops, num_names=options.num_names) for nodes, hops in stages]
        curve += learn(model, tasks, steps, BASE_RATES[phase], phase)
    model.save_pretrained(options.base)
    later = slept_on(options)
    scores = {
        "full attention": accuracy(model, task, options.test_rows),
        "full attention, what is slept on": accuracy(model, later, options.test_rows),
        "questions alone": accuracy(model, task, options.test_rows, task.window_size),
        "questions alone, of what is slept on": accuracy(model, later, options.test_rows, later.window_size),
        "parameters": model.num_parameters(),
        "curve": curve,
    }
    write_file(options.base / "results.json", json.dumps(scores, indent=1) + "\n")
    print(scores["full attention"], flush=True)


def slept_on(options: Arguments) -> KHopText:
    """The task of the retrofits, in the base's tokens."""
    return KHopText(options.num_nodes, tuple(options.hops), num_names=options.num_names)


def learn(
    model: LlamaForCausalLM, stages: list[KHopText], steps: int, rates: tuple[float, float], seed: int
) -> list[dict]:
    """Train on one stage after the other, each until it is learnt; returns the loss every 50 steps."""
    optimizer = MuonAdamW(parameter_groups(model), lr=rates[1], muon_lr=rates[0], weight_decay=0.0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    recent, curve = 0.0, []
    model.train()
    for step in range(steps):
        share = min(1.0, (step + 1) / 50, (steps - step) / (0.2 * steps))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = share * peak
        task = stages[0]
        rows = batch(task, seed, "train", range(32 * step, 32 * (step + 1)))
        labels = rows["labels"][:, 1:]
        logits = model(rows["input_ids"][:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        asked = rows["input_ids"].roll(1, 1)[:, :-1] == task.hop_token + task.hops[-1] - 1
        right = (logits.argmax(-1) == labels)[asked & (labels >= 0)].float().mean().item()
        recent = 0.9 * recent + 0.1 * right
        if step % 50 == 0:
            curve.append({"step": step, "nodes": task.num_nodes, "hops": task.hops, "loss": round(loss.item(), 4)})
            print(f"base  step {step:>5}/{steps}  {curve[-1]}  {recent:.2f}", flush=True)
        if recent > LEARNT and len(stages) > 1:
            stages, recent = stages[1:], 0.0
    return curve


def retrofit(options: Arguments, base: LlamaForCausalLM, arm: str, passes: int, seed: int) -> SleepForCausalLM:
    """The base with two blocks."""
    how, depth = ARMS[arm], base.config.num_hidden_layers
    layers = {"all": (0, depth), "middle": (depth // 4, depth - depth // 4)}
    first, last = layers[how.blocks]
    sleep = SleepConfig(
        window_size=4 * options.num_nodes,
        sleep_passes=passes,
        loop_layers=layers[how.loop],
        between=how.between,
        block_kind=options.block_kind,
        block_layers=tuple(int(first + share * (last - first)) for share in (0.25, 0.75)),
        block_num_heads=2,
        block_head_dim=base.config.hidden_size // 2,
        block_expand_v=1.0,
    )
    set_seed(seed)
    model = SleepForCausalLM.from_base(base, sleep)
    for block in model.fast_weights.values():
        block.init_weights(base.config.initializer_range)  # from the seed: a retrofit's follow from its base
    return model


@contextmanager
def carried_as(arm: Arm) -> Iterator[None]:
    """For as long as it lasts, passes start from the fast weights that the arm says."""
    ours = {"window_start": Recurrence.window_start, "rewound": Recurrence.rewound}
    whole = {"window_start": lambda slot, carried: carried, "rewound": lambda slot, carried, start: start}
    with patch.multiple(Recurrence, **(ours if arm.carries else whole)):
        yield


def rates(options: Arguments, train: str) -> tuple[float, float]:
    """Muon's and AdamW's; 0 for Muon's: AdamW trains everything."""
    given = options.muon_learning_rate, options.learning_rate
    muon, adamw = (usual if rate is None else rate for rate, usual in zip(given, RATES[train], strict=True))
    return muon, adamw


def settings_of(options: Arguments, train: str) -> dict[str, Any]:
    """What a run's file says of itself, and its name does not."""
    muon, adamw = rates(options, train)
    return {
        "batch_size": options.batch_size,
        "block_kind": options.block_kind,
        "muon_learning_rate": muon or None,
        "learning_rate": adamw,
        "hops": list(options.hops),
        "test_rows": options.test_rows,
        "base": fingerprint(pretrained(options)),
    }


def rows_of(task: KHopText, seed: int, batch_size: int, steps: int) -> Iterator[dict[str, Any]]:
    """Training rows: for a fifth of the steps about one hop, up to three fifths about two at most, then about all."""
    ends = {1: steps // 5, 2: 3 * steps // 5, len(task.hops): steps}
    first = 0
    for hops, last in ends.items():
        yield from replace(task, hops=task.hops[:hops]).rows(
            seed, "train", range(first * batch_size, last * batch_size)
        )
        first = last


class Curve(TrainerCallback):
    """Keeps the loss and the gradient's norm before clipping, of every step."""

    def __init__(self) -> None:
        self.loss: list[float] = []
        self.norm: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "grad_norm" in logs:
            self.loss.append(round(float(logs["loss"]), 4))
            self.norm.append(round(float(logs["grad_norm"]), 4))


def by_twenties(values: list[float], how: Callable[[list[float]], float]) -> list[float]:
    """One value for every 20 steps."""
    return [round(how(values[i : i + 20]), 3) for i in range(0, len(values), 20)]


def run(options: Arguments, train: str, arm: str, passes: int, seed: int) -> dict[str, Any]:
    """Retrofit, train and evaluate one model."""
    task = slept_on(options)
    model = retrofit(options, pretrained(options), arm, passes, seed)
    if train == "blocks":
        freeze_all_but_fast_weights(model)
    muon, adamw = rates(options, train)
    arguments = SleepTrainingArguments(
        output_dir=str(options.output / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        muon_learning_rate=muon or None,
        learning_rate=adamw,
        weight_decay=0.0,
        lr_scheduler_kwargs={"num_decay_steps": int(0.4 * options.steps)},
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=seed,
    )
    given = {"task": task, "seed": seed, "batch_size": options.batch_size, "steps": options.steps}
    data = IterableDataset.from_generator(rows_of, gen_kwargs=given)
    curve = Curve()
    trainer = SleepTrainer(model, arguments, train_dataset=data, task=task, callbacks=[curve])
    trainer.remove_callback(PrinterCallback)
    before, began = accuracy(model, task, options.test_rows), time.process_time()
    trainer.train()
    seconds = time.process_time() - began
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        **{"train": train, "arm": arm, "sleep_passes": passes, "seed": seed, "steps": options.steps},
        **settings_of(options, train),
        "parameters_trained": trained,
        "sleep": model.config.sleep.to_dict(),
        "cpu_seconds": round(seconds, 1),
        "untrained": before,
        "accuracy": {
            n: accuracy(model, task, options.test_rows, sleep_passes=n) for n in {passes, *options.eval_passes}
        },
        "last_window_alone": accuracy(model, task, options.test_rows, task.window_size),
        "grad_norm": {"median": statistics.median(curve.norm), "max": max(curve.norm)},
        "loss": by_twenties(curve.loss, statistics.mean),
        "largest_norm": by_twenties(curve.norm, max),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, hf_sleep)}
        | {"python": platform.python_version()},
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: accuracy by k at each model's own N, mean±deviation over seeds; seconds and gradient norms."""
    groups = defaultdict(list)
    for result in results:
        groups[result["train"], result["arm"], result["sleep_passes"], result["steps"]].append(result)
    levels = sorted(int(k) for k in results[0]["untrained"])
    lines = ["| train | arm | N | steps | " + " | ".join(f"k = {k}" for k in levels) + " | CPU s | gradient, max |"]
    lines.append("|---" * (6 + len(levels)) + "|")
    for (train, arm, n, steps), mine in sorted(groups.items()):
        scores = [mean_and_spread([r["accuracy"][str(n)][str(k)] for r in mine]) for k in levels]
        seconds = statistics.mean(r["cpu_seconds"] for r in mine)
        norm = f"{statistics.mean(r['grad_norm']['median'] for r in mine):.2g}"
        most = f"{max(r['grad_norm']['max'] for r in mine):.2g}"
        lines.append(f"| {train} | {arm} | {n} | {steps} | {' | '.join(scores)} | {seconds:.0f} | {norm}, {most} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = parse(Arguments, __doc__, arguments)
    torch.set_num_threads(options.threads)
    pretrained(options)
    options.output.mkdir(parents=True, exist_ok=True)
    results = []
    for seed, train, passes, arm in product(options.seeds, options.train, options.sleep_passes, options.arms):
        if passes == 1 and any(
            ARMS[other].blocks == ARMS[arm].blocks for other in options.arms[: options.arms.index(arm)]
        ):
            continue  # with one pass nothing loops
        file = options.output / f"{train}-{arm}-N{passes}-seed{seed}-{options.steps}.json"
        if not file.exists():
            with carried_as(ARMS[arm]):
                write_file(file, json.dumps(run(options, train, arm, passes, seed)) + "\n")
        results.append(json.loads(file.read_text(encoding="utf-8")))
        refuse_others(file, settings_of(options, train), results[-1])
        refuse_others(file, {"window_size": slept_on(options).window_size}, results[-1]["sleep"])
        if missing := {str(n) for n in options.eval_passes} - results[-1]["accuracy"].keys():
            raise SystemExit(f"{file} was not asked with N = {min(missing)}: choose another folder")
        print(file.stem, results[-1]["accuracy"][str(passes)], f"{results[-1]['cpu_seconds']} s", flush=True)
    print(f"\n{table(results)}")
    return results


if __name__ == "__main__":
    main()
