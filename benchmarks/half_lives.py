"""Steps until a small model remembers, by how the decay of its blocks begins.

    python benchmarks/half_lives.py --windows 2 --window-size 256 --seeds 0 1 2

A hybrid from scratch (recipes/shared/from_scratch.py, four heads) learns k-hop with k = 1, N = 1, until its accuracy is
above 0.9. Its first values differ by the decay of the block's heads alone: Mamba's, or half-lives from a quarter of a
window to 16 windows. Prints a JSON line per run.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_sleep.data import KHop
from hf_sleep.labels import IGNORED
from hf_sleep.layers.block import spread
from hf_sleep.training.optimizer import MuonAdamW, parameter_groups

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))

from shared.from_scratch import hybrid

HEADS = 4


@dataclass(frozen=True)
class WideWindows(KHop):
    """k-hop whose windows are filled up to `size` tokens."""

    size: int = 10

    @property
    def window_size(self):
        return self.size


@torch.no_grad()
def begin(model, arm, window_size, seed):
    """Set the decay of every block, and nothing else of it."""
    for block in model.fast_weights.values():
        kept = {name: p.clone() for name, p in block.mixer.named_parameters() if name not in ("A_log", "dt_bias")}
        if arm == "mamba":
            block.mixer.draw_weights(0.02, torch.Generator().manual_seed(1000 + seed))
        else:
            block.mixer.init_half_lives(spread(0.25 * window_size, 16.0 * window_size, HEADS))
        for name, p in block.mixer.named_parameters():
            if name in kept:
                p.copy_(kept[name])


def accuracy(model, ids, labels):
    with torch.no_grad():
        said = model.eval()(ids).logits[:, :-1].argmax(-1)
    asked = labels[:, 1:] != IGNORED
    return (said == labels[:, 1:])[asked].float().mean().item()


def run(options, arm, seed):
    task = WideWindows(8, hops=(1,), windows=options.windows, size=options.window_size)
    model = hybrid(task.vocab_size, task.window_size, 1, heads=HEADS, seed=seed)
    begin(model, arm, task.window_size, seed)
    optimizer = MuonAdamW(parameter_groups(model), lr=0.01, muon_lr=0.02, weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    test = task.dataset(256, seed=1, split="test").with_format("torch")[:]
    curve, reached, began, size = {}, None, time.monotonic(), options.batch_size
    for step in range(options.steps):
        rows = task.rows(seed, "train", range(step * size, (step + 1) * size))
        ids, labels = (torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels"))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, (step + 1) / 50)
        optimizer.zero_grad()
        model.train()(ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % options.every == 0:
            curve[step + 1] = round(accuracy(model, test["input_ids"], test["labels"]), 3)
            if curve[step + 1] > 0.9:
                reached = step + 1
                break
    seconds = round(time.monotonic() - began)
    print(json.dumps({"arm": arm, "seed": seed, "reached": reached, "curve": curve, "seconds": seconds}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--window-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--every", type=int, default=10, help="steps between two evaluations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for arm in ("mamba", "spread"):
            run(options, arm, seed)


if __name__ == "__main__":
    main()
