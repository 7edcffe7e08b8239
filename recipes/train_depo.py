"""Depo: the edges of a directed cycle of names are slept on, then asked for the name k steps after another.

python recipes/train_depo.py                             # cycles of up to 12 names, k up to 4: minutes on two CPU cores
python recipes/train_depo.py --preset paper              # 75 names, k up to 16, ten layers of width 512: a GPU and days

Same weights at the start, same data, same steps for every N. Writes config.json, metrics.jsonl, results.json,
accuracy.png and a checkpoint per model.

Source: Allen-Zhu, Physics of Language Models 4.1; Lee et al. 2026 (arXiv 2605.26099), the Depo experiment: ten layers
in its text (four in a caption), batch 128, 100,000 steps.
"""

from pathlib import Path

from from_scratch import argument_parser, compare, parse

from hf_sleep.data import Depo

PRESETS = {
    "small": {},
    "paper": {
        "max_nodes": 75,
        "max_hops": 16,
        "num_queries": 10,
        "mini_vocab": 50,
        "window_size": 75,
        "layers": 5,
        "hidden_size": 512,
        "heads": 8,
        "batch_size": 128,
        "steps": 100_000,
        "sleep_passes": [1, 2, 4],
        "muon_learning_rate": 2e-3,
        "learning_rate": 5e-5,
    },
}


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argument_parser(__doc__, output=Path("runs/depo"))
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--max-nodes", type=int, default=12)
    parser.add_argument("--max-hops", type=int, default=4)
    parser.add_argument("--num-queries", type=int, default=4)
    parser.add_argument("--mini-vocab", type=int, default=8, help="tokens that names of one or two tokens are made of")
    parser.add_argument("--window-size", type=int, default=24, help="L, in tokens")
    options = parse(parser, PRESETS, arguments)
    names = ("max_nodes", "max_hops", "num_queries", "mini_vocab", "window_size")
    return compare(options, Depo(**{name: getattr(options, name) for name in names}), "k")


if __name__ == "__main__":
    main()
