# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-sleep[train]"]
#
# [tool.uv.sources]
# hf-sleep = { path = "..", editable = true }
# ///
"""k-hop: does more sleep reach further? Trains a small hybrid from scratch per seed and N, and compares them.

python recipes/train_khop.py                                        # n = 8, N = 1, 2, 3: minutes on two CPU cores
python recipes/train_khop.py --num-nodes 10 --steps 1500 --sleep-passes 1 2 3 4 --seeds 0 1 2
python recipes/train_khop.py --sleep-passes 1 --steps 3000          # N = 1 for as long as N = 3 takes
python recipes/train_khop.py --curriculum 1:500 2:400 4:600         # a cycle over four windows, learned over fewer

The model reads a shuffled directed cycle in one window, sleeps, and is asked in the next for the k-th successor of
every node. Same weights at the start, same data, same steps for every N; only N differs. With --eval-passes each model
is also evaluated at other N. With --curriculum a cycle is spread over more windows later; evaluations are of the last
stage. Writes config.json, metrics.jsonl, results.json, accuracy.png and a checkpoint per model.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from shared.arguments import argument, parse
from shared.from_scratch import Comparison, compare, staged

from hf_sleep.data import KHop


@dataclass
class Arguments(Comparison):
    num_nodes: int = argument(8, "n, the length of the cycle")
    windows: int = argument(1, "slept windows that a cycle is spread over")
    cycles: int = argument(1, "cycles in a row, each in windows of its own")
    curriculum: list[str] = argument([], "windows:steps of every stage, instead of --windows and --steps")
    output: Path = argument(Path("runs/khop"), "a folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.curriculum:
            return
        if (self.windows, self.steps) != (Arguments.windows, Arguments.steps):
            raise ValueError("--curriculum says the windows and the steps: leave out --windows and --steps")
        if wrong := [stage for stage in self.curriculum if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", stage)]:
            raise ValueError(f"--curriculum {wrong[0]}: a stage is windows:steps, as 1:500")
        self.windows, self.steps = self.stages[-1][0], sum(steps for _, steps in self.stages)

    @property
    def stages(self) -> list[tuple[int, int]]:
        """Windows and steps of every stage."""
        if not self.curriculum:
            return [(self.windows, self.steps)]
        return [(int(windows), int(steps)) for windows, _, steps in (stage.partition(":") for stage in self.curriculum)]

    def training_rows(self, task: Any, seed: int, done: int, rows_per_step: int) -> IterableDataset:
        stages = tuple((dataclasses.replace(task, windows=windows), steps) for windows, steps in self.stages)
        return staged(stages, seed, done, rows_per_step)

    def said(self, task: Any, processes: int) -> str:
        by_stage = ", ".join(f"{steps} with windows={windows}" for windows, steps in self.stages)
        return super().said(task, processes) + (f" ({by_stage})" if self.curriculum else "")


def main(arguments: list[str] | None = None) -> list[dict]:
    options = parse(Arguments, __doc__, arguments)
    return compare(options, KHop(options.num_nodes, windows=options.windows, cycles=options.cycles), "k")


if __name__ == "__main__":
    main()
