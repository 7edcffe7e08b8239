"""k-hop: does more sleep reach further? Trains a small hybrid from scratch per seed and N, and compares them.

python recipes/train_khop.py                                        # n = 8, N = 1, 2, 3: minutes on two CPU cores
python recipes/train_khop.py --num-nodes 10 --steps 1500 --sleep-passes 1 2 3 4 --seeds 0 1 2
python recipes/train_khop.py --sleep-passes 1 --steps 3000          # N = 1 for as long as N = 3 takes

The model reads a shuffled directed cycle in one window, sleeps, and is asked in the next for the k-th successor of
every node. Same weights at the start, same data, same steps for every N; only N differs. With --eval-passes each model
is also evaluated at other N. Writes config.json, metrics.jsonl, results.json, accuracy.png and a checkpoint per model.
"""

from dataclasses import dataclass
from pathlib import Path

from shared.arguments import argument, parse
from shared.from_scratch import Comparison, compare

from hf_sleep.data import KHop


@dataclass
class Arguments(Comparison):
    num_nodes: int = argument(8, "n, the length of the cycle")
    windows: int = argument(1, "slept windows that a cycle is spread over")
    cycles: int = argument(1, "cycles in a row, each in windows of its own")
    output: Path = argument(Path("runs/khop"), "a folder")


def main(arguments: list[str] | None = None) -> list[dict]:
    options = parse(Arguments, __doc__, arguments)
    return compare(options, KHop(options.num_nodes, windows=options.windows, cycles=options.cycles), "k")


if __name__ == "__main__":
    main()
