# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-sleep", "lm-eval>=0.4.13"]
#
# [tool.uv.sources]
# hf-sleep = { path = "..", editable = true }
# ///
"""lm-evaluation-harness on a model that sleeps: nothing is cut at the base's positions, and sleeps are counted.

pip install lm-eval                                                        # 0.4.13 was run
python recipes/lm_evaluation.py --tasks lambada_openai --limit 100         # SmolLM2 as `make demo` left it
python recipes/lm_evaluation.py --model runs/mine --tasks wikitext --window-size 512 --sleep-passes 2
uv run recipes/lm_evaluation.py --tasks hellaswag

A base is retrofitted, untrained. `--window-size` and `--sleep-passes` are by default the checkpoint's.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from shared.arguments import argument, parse
from shared.log_likelihoods import log_likelihoods
from transformers import AutoTokenizer

from hf_sleep import AutoModelForSleepLM, SleepEvent, SleepForCausalLM
from hf_sleep.files import write_file

NO_LIMIT = 2**31


@dataclass
class Arguments:
    model: str = argument(".demo/SmolLM2-135M-Instruct", "Hub id or folder")
    tokenizer: str | None = argument(None, "Hub id or folder of its tokenizer; None: it lies with the model")
    tasks: list[str] = argument(["lambada_openai"], "names of the harness's tasks")
    include_path: str | None = argument(None, "folder with tasks of your own")
    limit: int | None = argument(None, "rows of each task; None: all")
    batch_size: int = argument(4, "rows that are read together")
    window_size: int | None = argument(None, "tokens between two sleeps")
    sleep_passes: int | None = argument(None, "passes over a full window")
    output: Path | None = argument(None, "a file for the results, as JSON")


class SleepLM(HFLM):
    """The harness's causal model, with contexts of any length and pads that are never read."""

    def __init__(self, model: SleepForCausalLM, tokenizer: Any, batch_size: int):
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=NO_LIMIT, batch_size=batch_size)
        self.sleeps = 0
        model.on_sleep(self._count)

    def _count(self, event: SleepEvent) -> None:
        self.sleeps += 1

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        pairs = [(context, continuation) for _, context, continuation in requests]
        answers = log_likelihoods(self.model, pairs, override_bs or self.batch_size)
        for (text, _, _), answer in zip(requests, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(Arguments, __doc__, arguments)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    asked = {"window_size": options.window_size, "sleep_passes": options.sleep_passes}
    sleep = {name: value for name, value in asked.items() if value is not None}
    model = AutoModelForSleepLM.from_pretrained(options.model, sleep=sleep).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.model)
    evaluated = SleepLM(model, tokenizer, options.batch_size)
    results = lm_eval.simple_evaluate(
        evaluated,
        tasks=options.tasks,
        limit=options.limit,
        task_manager=TaskManager(include_path=options.include_path),
    )
    made = {"results": results["results"], "sleeps": evaluated.sleeps, "sleep": model.config.sleep.to_dict()}
    print(make_table(results))
    print(f"{evaluated.sleeps} sleeps, window_size={model.config.sleep.window_size}")
    if options.output is not None:
        write_file(options.output, json.dumps(made, indent=2, default=str) + "\n")
    return made


if __name__ == "__main__":
    main()
