# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-sleep[train]"]
#
# [tool.uv.sources]
# hf-sleep = { path = "..", editable = true }
# ///
"""Managers: teach a pretrained model to sleep on who manages whom, and then to name managers of managers.

accelerate launch recipes/finetune_managers.py            # SmolLM2 as `make demo` left it; minutes on two CPU cores
accelerate launch recipes/finetune_managers.py --sleep-passes 4 --eval-passes 1 2 4 --steps 640 --output runs/n4

A paragraph of plain English is slept on, window by window, before anything is asked; the loss is on the answers alone.
By default only the new blocks are trained, at learning rates that are too high for a whole model. Answers are judged
before and after, also from the last window alone (which knows nothing of the paragraph), and with everything in context
and no sleep (before: the base). With --minutes a run can be done in parts: the same command with --resume continues it.
Writes config.json, metrics.jsonl, results.json, accuracy.png and the model; compare_runs.py tests two of them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.arguments import argument
from shared.finetuning import FineTuning, complete, finetune, parse_fine_tuning
from transformers import AutoTokenizer

from hf_sleep.data import Managers


@dataclass
class Arguments(FineTuning):
    people: int = argument(8, "in a paragraph")
    hops: list[int] = argument([1, 2, 3, 4], "each number of managers that is asked for, one after another")
    windows: int = argument(2, "slept windows that the facts are spread over")
    questions: int = argument(4, "about each paragraph")
    output: Path = argument(Path("runs/finetune_managers"), "a folder")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse_fine_tuning(Arguments, __doc__, arguments)
    complete(options)
    task = Managers(
        AutoTokenizer.from_pretrained(options.model),
        people=options.people,
        hops=tuple(options.hops),
        windows=options.windows,
        questions=options.questions,
        window_size=options.window_size,
    )
    return finetune(options, task, "Managers", "hops", f"{options.questions} questions each after it was slept on")


if __name__ == "__main__":
    main()
