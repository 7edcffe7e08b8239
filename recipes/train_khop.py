"""k-hop: does more sleep reach further? Trains a small hybrid from scratch per seed and N, and compares them.

python recipes/train_khop.py                                        # n = 8, N = 1, 2, 3: minutes on two CPU cores
python recipes/train_khop.py --num-nodes 10 --steps 1500 --sleep-passes 1 2 3 4 --seeds 0 1 2
python recipes/train_khop.py --sleep-passes 1 --steps 3000          # N = 1 for as long as N = 3 takes

The model reads a shuffled directed cycle in one window, sleeps, and is asked in the next for the k-th successor of
every node. Same weights at the start, same data, same steps for every N; only N differs. With --eval-passes each model
is also evaluated at other N. Writes config.json, metrics.jsonl, results.json, accuracy.png and a checkpoint per model.
"""

from pathlib import Path

from from_scratch import argument_parser, compare

from hf_sleep.data import KHop


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argument_parser(__doc__, output=Path("runs/khop"))
    parser.add_argument("--num-nodes", type=int, default=8, help="n, the length of the cycle")
    parser.add_argument("--windows", type=int, default=1, help="slept windows that a cycle is spread over")
    parser.add_argument("--cycles", type=int, default=1, help="cycles in a row, each in windows of its own")
    options = parser.parse_args(arguments)
    return compare(options, KHop(options.num_nodes, windows=options.windows, cycles=options.cycles), "k")


if __name__ == "__main__":
    main()
