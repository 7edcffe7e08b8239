# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-sleep[train]"]
#
# [tool.uv.sources]
# hf-sleep = { path = "..", editable = true }
# ///
"""Depo: the edges of a directed cycle of names are slept on, then asked for the name k steps after another.

python recipes/train_depo.py                             # cycles of up to 12 names, k up to 4: minutes on two CPU cores
python recipes/train_depo.py --preset paper              # 75 names, k up to 16, ten layers of width 512: a GPU and days

Same weights at the start, same data, same steps for every N. Writes config.json, metrics.jsonl, results.json,
accuracy.png and a checkpoint per model.

Source: Allen-Zhu, Physics of Language Models 4.1; Lee et al. 2026 (arXiv 2605.26099), the Depo experiment: ten layers
in its text (four in a caption), batch 128, 100,000 steps.
"""

from dataclasses import dataclass
from pathlib import Path

from shared.arguments import argument, parse
from shared.from_scratch import Comparison, compare

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


@dataclass
class Arguments(Comparison):
    preset: str = argument("small", "settings that stand where none is given", choices=tuple(PRESETS))
    max_nodes: int = argument(12, "the longest cycle")
    max_hops: int = argument(4, "the largest k")
    num_queries: int = argument(4, "questions in a row")
    mini_vocab: int = argument(8, "tokens that names of one or two tokens are made of")
    window_size: int = argument(24, "L, in tokens")
    output: Path = argument(Path("runs/depo"), "a folder")


def main(arguments: list[str] | None = None) -> list[dict]:
    options = parse(Arguments, __doc__, arguments, PRESETS)
    names = ("max_nodes", "max_hops", "num_queries", "mini_vocab", "window_size")
    return compare(options, Depo(**{name: getattr(options, name) for name in names}), "k")


if __name__ == "__main__":
    main()
