# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-sleep[train]"]
#
# [tool.uv.sources]
# hf-sleep = { path = "..", editable = true }
# ///
"""Retention: how much of a cycle is left after many further windows, each slept on? For models of train_khop.py.

python recipes/train_khop.py --cycles 2 --output runs/khop2          # the cycle of one is retained while others come
python recipes/retention.py runs/khop2/N3-seed0                      # after 0, 4, 16, 64 further windows
python recipes/retention.py runs/khop2/N3-seed0 --sleep-passes 1 3 --further 0 1 2 4 8 16 32 64 128

The model reads the first cycle of a test row and then further windows, with N passes over each, and is asked for
successors in the first cycle, by k. Asking changes nothing. The further windows are of two kinds. `fill`: nothing but
fill. `edges`: those of all cycles but the first, out of other test rows. A model that was trained with --cycles C knows
C sets of names, so these windows write and write over C - 1 sets of names, and never speak of the first: what is lost
is forgotten, not corrected. With one cycle there are no other names, and `fill` alone is measured. In training up to
C - 1 cycles followed the first. Writes config.json and results.json.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from shared.arguments import argument, parse
from shared.run_folder import RunFolder

from hf_sleep import SleepCache, SleepForCausalLM
from hf_sleep.data import KHop
from hf_sleep.eval.suite import make_task, trained_on
from hf_sleep.files import write_file

KINDS = ("fill", "edges")


@dataclass
class Arguments:
    model: str = field(init=False)
    further: list[int] = argument([0, 4, 16, 64], "windows between the cycle and the questions, each number of them")
    sleep_passes: list[int] | None = argument(None, "each N; None: the checkpoint's")
    rows: int = argument(256, "test rows, read at once")
    seed: int = argument(1, "of the test rows")
    output: Path = argument(Path("runs/retention"), "a folder")


def split(task: KHop, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of the first cycle, and of all others: `[rows, tokens]` each."""
    ids = torch.tensor([row["input_ids"][: task.cycles * task.windows * task.window_size] for row in rows])
    first = task.windows * task.window_size
    return ids[:, :first], ids[:, first:]


def further_windows(task: KHop, kind: str, count: int, rows: int, seed: int) -> torch.Tensor:
    """`[rows, count, L]` tokens of windows that do not speak of the first cycle."""
    if kind == "fill":
        return torch.full((rows, count, task.window_size), task.fill_token)
    per_row = (task.cycles - 1) * task.windows
    needed = -(-count // per_row)  # other rows for each row
    others = split(task, task.rows(seed, "test", range(rows, rows * (1 + needed))))[1]
    return others.reshape(rows, needed * per_row, task.window_size)[:, :count]


def questions(task: KHop, cycle: torch.Tensor, which: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The window that asks about q nodes of the first cycle for hop number `which`, and the answers.

    Args:
        cycle: `[rows, tokens]` that the first cycle was read from.

    Returns:
        `[rows, q + 2]` tokens, and `[rows, q]` tokens of the answers, which are said at the nodes.
    """
    n, rows = task.num_nodes, len(cycle)
    edges = cycle[cycle != task.fill_token].view(rows, n)
    successor = torch.empty_like(edges).scatter_(1, edges // n, edges % n)
    answer = asked = torch.arange(n)[: task.num_queries].expand(rows, -1)
    for _ in range(task.hops[which]):
        answer = successor.gather(1, answer)
    hop, fill = (torch.full((rows, 1), token) for token in (task.hop_token + which, task.fill_token))
    return torch.cat([hop, task.node_token + asked, fill], dim=1), task.node_token + answer


@torch.no_grad()
def retention(model: SleepForCausalLM, task: KHop, kind: str, options: Arguments) -> dict[tuple[int, int], float]:
    """Accuracy by number of further windows and k."""
    cycle, _ = split(task, task.rows(options.seed, "test", range(options.rows)))
    between = further_windows(task, kind, max(options.further), options.rows, options.seed)
    cache, done, scores = SleepCache(), 0, {}
    model(cycle, cache=cache, logits_to_keep=1)
    for count in sorted(set(options.further)):
        if count > done:
            model(between[:, done:count].flatten(1), cache=cache, logits_to_keep=1)
            done = count
        for which, k in enumerate(task.hops):
            ids, answers = questions(task, cycle, which)
            said = model(ids, cache=cache.fork()).logits[:, 1:-1].argmax(-1)
            scores[count, k] = (said == answers).float().mean().item()
    return scores


def table(scores: list[dict[str, Any]], task: KHop) -> str:
    """Markdown: accuracy by k, a line for every N, kind and number of further windows."""
    lines = ["| N | further windows | " + " | ".join(f"k = {k}" for k in task.hops) + " |"]
    lines.append("|---" * (2 + len(task.hops)) + "|")
    for start in range(0, len(scores), len(task.hops)):
        same = scores[start : start + len(task.hops)]
        cells = " | ".join(f"{score['accuracy']:.2f}" for score in same)
        lines.append(f"| {same[0]['N']} | {same[0]['further']} of {same[0]['kind']} | {cells} |")
    lines.append(f"| chance | | {' | '.join(f'{task.chance(k):.2f}' for k in task.hops)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    positional = {"model": {"help": "a checkpoint of train_khop.py"}}
    options = parse(Arguments, __doc__, arguments, positional=positional)
    settings = trained_on(options.model)
    if settings.pop("task", None) != "KHop":
        raise SystemExit(f"{options.model} has no task.json of k-hop: give a checkpoint of train_khop.py")
    task = make_task("khop", settings)
    run = RunFolder(options.output, vars(options))
    model = SleepForCausalLM.from_pretrained(options.model).eval()
    scores = []
    for passes in options.sleep_passes or [model.config.sleep.sleep_passes]:
        for kind in KINDS if task.cycles > 1 else KINDS[:1]:
            with model.sleeping(sleep_passes=passes):
                found = retention(model, task, kind, options)
            scores += [
                {"N": passes, "kind": kind, "further": further, "k": k, "accuracy": accuracy, "chance": task.chance(k)}
                for (further, k), accuracy in found.items()
            ]
    write_file(run.path / "results.json", json.dumps(scores, indent=1) + "\n")
    print(table(scores, task))
    return scores


if __name__ == "__main__":
    main()
