# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-sleep[train]"]
#
# [tool.uv.sources]
# hf-sleep = { path = "..", editable = true }
# ///
"""Rule 110: four strings are slept on, then asked for the first bit of each after t steps of the automaton.

python recipes/train_rule110.py                          # strings of 13 bits, t = 2: minutes on two CPU cores
python recipes/train_rule110.py --preset paper           # 24 bits, t = 32, four layers of width 256: a GPU and days
python recipes/train_rule110.py --preset paper --automaton-steps 4 --sleep-passes 1 3

Same weights at the start, same data, same steps for every N. Writes config.json, metrics.jsonl, results.json,
accuracy.png and a checkpoint per model. Accuracy is of all four bits of a row; chance is the majority bit, four times.

Source: Lee et al. 2026 (arXiv 2605.26099), the Rule 110 experiment; Muon at 2e-3, AdamW at 5e-5, batch 512, 5 billion
tokens (about 97,000 steps of 101 tokens).
"""

from dataclasses import dataclass
from pathlib import Path

from shared.arguments import argument, parse
from shared.from_scratch import Comparison, compare

from hf_sleep.data import Rule110

PRESETS = {
    "small": {},
    "paper": {
        "width": 24,
        "automaton_steps": 32,
        "layers": 2,
        "hidden_size": 256,
        "heads": 4,
        "batch_size": 512,
        "steps": 97_000,
        "sleep_passes": [1, 2, 3, 4],
        "muon_learning_rate": 2e-3,
        "learning_rate": 5e-5,
    },
}


@dataclass
class Arguments(Comparison):
    preset: str = argument("small", "settings that stand where none is given", choices=tuple(PRESETS))
    width: int = argument(13, "bits of a string; L is as long")
    automaton_steps: int = argument(2, "t")
    output: Path = argument(Path("runs/rule110"), "a folder")


def main(arguments: list[str] | None = None) -> list[dict]:
    options = parse(Arguments, __doc__, arguments, PRESETS)
    return compare(options, Rule110(options.width, options.automaton_steps), "t")


if __name__ == "__main__":
    main()
