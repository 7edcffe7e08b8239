# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-sleep[train]"]
#
# [tool.uv.sources]
# hf-sleep = { path = "..", editable = true }
# ///
"""GSM-Infinite: teach a pretrained model to sleep on a text of quantities, and then to work out the one asked for.

accelerate launch recipes/finetune_gsm.py                 # SmolLM2 as `make demo` left it; minutes on two CPU cores
accelerate launch recipes/finetune_gsm.py --model Qwen/Qwen3-0.6B --window-size 256 --tokens 700 1200 --steps 2000
accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/finetune_gsm.py --preset paper-jet-nemotron

The question comes first, there is no chain of thought, and the loss is on the answer alone. By default only the new
blocks are trained, at learning rates that are too high for a whole model. Answers are judged before and after, also
from the last window alone: what is above that and above chance (the commonest answer) was remembered. With everything
in context and no sleep, before is the base itself. With --minutes a run can be done in parts: the same command with
--resume continues it. Writes config.json, metrics.jsonl, results.json, accuracy.png and the model; compare_runs.py
tests two of them.

Source: Lee et al. 2026 (arXiv 2605.26099), the GSM-Infinite experiment, for the presets. Steps, and how they are shared
out between a sliding preset's stages (the paper counts epochs), are ours, as are SmolLM2's model and lengths. A
preset's batch is 256 rows on one process: divide --gradient-accumulation-steps by the number of processes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.arguments import argument, require_pair
from shared.finetuning import FineTuning, complete, finetune, parse_fine_tuning
from transformers import AutoTokenizer

from hf_sleep.data import GSMInfinite

PAPER = {
    "ops": [1, 8],
    "tokens": [2000, 3300],
    "window_size": 2000,
    "eviction": "hard",
    "batch_size": 2,
    "gradient_accumulation_steps": 128,
    "muon_learning_rate": 1e-3,
    "learning_rate": 5e-5,
    "steps": 1000,
    "save_steps": 50,
    "eval_problems": 1600,
    "whole_model": True,
    "checkpointing": True,
    "block_half_lives": [0, 0],
}
OURO = PAPER | {
    "model": "ByteDance/Ouro-1.4B",
    "sleep_passes": 4,
    "loop_layers": [0, 24],
    "block_num_heads": 12,
    "block_head_dim": 96,
    "eval_passes": [1, 4],
}
# The paper's sliding setting at a quarter of its lengths, so that a row has as many windows. As everything is trained,
# nothing stands between the passes, as in the paper.
SMOLLM2 = PAPER | {
    "between": "none",
    "tokens": [500, 825],
    "window_size": 128,
    "num_blocks": 6,
    "batch_size": 128,
    "gradient_accumulation_steps": 2,
    "steps": 300,
    "block_half_lives": None,
}
PRESETS = {
    "small": {},
    "smollm2": SMOLLM2,
    "smollm2-sliding": SMOLLM2 | {"eviction": "sliding", "hard_warmup_steps": 100},
    "paper-jet-nemotron": PAPER
    | {"model": "jet-ai/Jet-Nemotron-2B", "sleep_passes": 6, "loop_layers": [7, 21], "eval_passes": [1, 6]},
    "paper-ouro": OURO,
    "paper-ouro-sliding": OURO | {"window_size": 512, "eviction": "sliding", "steps": 1500, "hard_warmup_steps": 500},
}


@dataclass
class Arguments(FineTuning):
    preset: str = argument("small", "settings that stand where none is given", choices=tuple(PRESETS))
    ops: list[int] = argument([1, 4], "fewest and most operations")
    tokens: list[int] = argument([0, 0], "fewest and most of a prompt, with distractors; 0 0: none")
    output: Path = argument(Path("runs/finetune_gsm"), "a folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ops", "tokens"):
            require_pair(name, getattr(self, name))


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    return parse_fine_tuning(Arguments, __doc__, arguments, PRESETS)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse_arguments(arguments)
    complete(options)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    task = GSMInfinite(tokenizer, ops=tuple(options.ops), tokens=tuple(options.tokens), window_size=options.window_size)
    return finetune(options, task, "GSM-Infinite", "operations", "question first")


if __name__ == "__main__":
    main()
