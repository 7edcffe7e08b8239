"""Effect of more sleep, in seconds: three tiny models, alike but for N, follow a shuffled cycle from memory.

python examples/khop.py            # the three models in examples/khop: accuracy by k and N, and a few questions
python examples/khop.py --train    # train them first, in two processes: about three minutes on two CPU cores

A model reads the edges of a directed cycle of 8 nodes in one window, sleeps with N passes, and drops its KV cache. Then
it is asked for the k-th successor of a node: one ordinary pass over the fast weights. Training is
recipes/train_khop.py.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from hf_sleep import AutoModelForSleepLM
from hf_sleep.data import KHop

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parent / "recipes"
TASK = KHop(8)
ROWS = 512
console = Console(highlight=False)


def train(folder: Path, steps: int) -> dict[int, Path]:
    """Train N = 3 in one process, N = 1 and 2 in another; the models by N. Prints their progress as it comes."""
    parts = {"3": folder / "three", "1 2": folder / "one-two"}
    processes = []
    for passes, output in parts.items():
        command = [sys.executable, str(RECIPES / "train_khop.py"), "--sleep-passes", *passes.split()]
        command += ["--steps", str(steps), "--output", str(output)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        threads = [threading.Thread(target=show, args=(process,)), threading.Thread(target=drain, args=(process,))]
        for thread in threads:
            thread.start()
        processes.append((process, threads))
    for process, threads in processes:
        process.wait()
        for thread in threads:
            thread.join()
        if process.returncode:
            raise SystemExit(f"training failed ({process.returncode}):\n{process.errors[-2000:]}")
    return {1: parts["1 2"] / "N1-seed0", 2: parts["1 2"] / "N2-seed0", 3: parts["3"] / "N3-seed0"}


def show(process: subprocess.Popen) -> None:
    for line in process.stdout:
        if "step" in line:
            console.print(line.rstrip())


def drain(process: subprocess.Popen) -> None:
    process.errors = process.stderr.read()


@torch.no_grad()
def accuracy(model, passes: int) -> dict[int, float]:
    """Share of right answers by k on cycles that no model was trained on, asleep with `passes`."""
    hits: dict[int, list[bool]] = {k: [] for k in TASK.hops}
    rows = TASK.rows(1, "test", range(ROWS))
    predicted = model(torch.tensor([row["input_ids"] for row in rows]), sleep_passes=passes).logits.argmax(-1)
    for row, said in zip(rows, predicted.tolist(), strict=True):
        for k, hit in TASK.score(said, row):
            hits[k].append(hit)
    return {k: sum(each) / len(each) for k, each in hits.items()}


def ask(model, questions: int) -> None:
    """Read a cycle, sleep while generating, and answer: the prompt is the edges, the hop count and one node."""
    row = TASK.example(7, "test")
    edges = row["input_ids"][: TASK.window_size]
    successor = dict(divmod(edge, TASK.num_nodes) for edge in edges if edge < TASK.num_nodes**2)
    console.print(f"Edges, in the order read: {', '.join(f'{u}→{v}' for u, v in successor.items())}")
    for node in range(questions):
        k = TASK.hops[-1 - node % 2]
        right = node
        for _ in range(k):
            right = successor[right]
        prompt = torch.tensor([[*edges, TASK.hop_token + TASK.hops.index(k), TASK.node_token + node]])
        answer = model.generate(prompt, max_new_tokens=1, do_sample=False)[0, -1].item() - TASK.node_token
        console.print(f"  {k} steps after {node}: {answer} ({'right' if answer == right else f'wrong, it is {right}'})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fresh = Path("runs") / time.strftime("khop-%Y%m%d-%H%M%S")
    parser.add_argument("--train", type=Path, nargs="?", const=fresh, help="train first, into this new folder")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if options.train is not None and options.train.exists():
        raise SystemExit(f"{options.train} exists already: pass another folder to --train, or remove it")
    folders = {n: HERE / "khop" / f"N{n}" for n in (1, 2, 3)}
    if options.train is not None:
        folders = train(options.train, options.steps)
    models = {n: AutoModelForSleepLM.from_pretrained(folder).eval() for n, folder in folders.items()}
    scores = {n: accuracy(model, n) for n, model in models.items()}
    table = Table(title=f"Share of right answers, {ROWS} unseen cycles of {TASK.num_nodes} nodes")
    for column in ("trained and asleep with", *(f"k = {k}" for k in TASK.hops)):
        table.add_column(column)
    for n, by_k in scores.items():
        table.add_row(f"N = {n}", *(f"{by_k[k]:.2f}" for k in TASK.hops))
    table.add_row("chance", *(f"{TASK.chance(k):.2f}" for k in TASK.hops))
    console.print(table)
    if options.train is not None:
        console.print(f"Plot: {plot(options.train, scores)}")
    console.print("\nThe model of N = 3 answers, asleep on the way:")
    ask(models[3], 4)


def plot(folder: Path, scores: dict[int, dict[int, float]]) -> Path:
    sys.path.insert(0, str(RECIPES))
    from shared.run_folder import RunFolder

    run = RunFolder(folder / "plot", {"scores": json.loads(json.dumps(scores))})
    lines = {f"N = {n}": {k: [score] for k, score in by_k.items()} for n, by_k in scores.items()}
    return run.plot(lines, {k: TASK.chance(k) for k in TASK.hops}, "k (hops)")


if __name__ == "__main__":
    main()
