# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-sleep[train]"]
#
# [tool.uv.sources]
# hf-sleep = { path = "..", editable = true }
# ///
"""Accuracy of a checkpoint by difficulty, N and L. Any base or sleep checkpoint, any task of hf_sleep.data.

python recipes/evaluate.py runs/finetune_gsm/model gsm_infinite --task-settings '{"ops": [1, 8]}'
python recipes/evaluate.py runs/khop/N2-seed0 khop --sleep-passes 1 2 3 --window-size 8 16
accelerate launch recipes/evaluate.py Qwen/Qwen3-0.6B gsm_infinite --problems 1600 --window-size 2000 4000 --bf16

A base is given new blocks, which add nothing: it is the base with its window cut. Put more tokens in --window-size than
a row has, and it is the base itself. GSM-Infinite is generated greedily and must match to the end of the text, which a
base that was not trained on it seldom ends. Beside it stands what the last window alone tells, without a memory. The
other tasks are teacher-forced. All N and L read the same rows. A checkpoint of a recipe carries its task's settings
(task.json), which are used where none are given; what differs is said. Writes config.json, metrics.jsonl, results.json
and accuracy.png.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from shared.arguments import JSONObject, argument, parse
from shared.run_folder import RunFolder
from shared.scores import Score, by_difficulty, forced_scores, generation_rows, generation_scores, plot, table
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import cached_file

from hf_sleep import AutoModelForSleepLM, SleepLMConfig
from hf_sleep.data import Depo, GSMInfinite, KHop, Managers, Rule110
from hf_sleep.data.task import Task
from hf_sleep.files import write_file
from hf_sleep.training import GenerationEvaluation, SleepTrainer, SleepTrainingArguments
from hf_sleep.training.trainer import TASK_FILE

TASKS = {"gsm_infinite": GSMInfinite, "rule110": Rule110, "depo": Depo, "khop": KHop, "managers": Managers}
POSITIONAL = {
    "model": {"help": "Hub id or folder, of a base or of a model that sleeps"},
    "task": {"choices": tuple(TASKS), "help": "what to ask"},
}


@dataclass
class Arguments:
    model: str = field(init=False)
    task: str = field(init=False)
    task_settings: JSONObject = argument(JSONObject(), "the task's fields as JSON; {}: the checkpoint's")
    sleep_passes: list[int] | None = argument(None, "each N; None: the checkpoint's")
    window_size: list[int] | None = argument(None, "each L, in tokens; None: the checkpoint's, of a base the task's")
    problems: int = argument(200, "test rows")
    batch_size: int = argument(8, "rows that are read at once")
    bf16: bool = argument(False, "compute in bfloat16")
    seed: int = argument(1, "of the test rows")
    output: Path = argument(Path("runs/evaluate"), "a folder")


def make_task(name: str, settings: dict[str, Any], model: str, window_size: int | None) -> Task:
    """A task by its name; `settings` come from JSON, without tuples. Tasks in words are laid out for `window_size`."""
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    unknown = settings.keys() - {field.name for field in dataclasses.fields(TASKS[name])}
    if unknown:
        raise SystemExit(f"--task-settings: {TASKS[name].__name__} has no field {', '.join(sorted(unknown))}")
    if name in ("gsm_infinite", "managers"):
        settings["tokenizer"] = AutoTokenizer.from_pretrained(model)
        settings |= {} if window_size is None else {"window_size": window_size}
    return TASKS[name](**settings)


def trained_on(model: str) -> dict[str, Any]:
    """The task that a checkpoint of SleepTrainer carries: its class's name and its fields; empty where it has none."""
    missing = {
        f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")
    }
    file = cached_file(model, TASK_FILE, **missing)
    return {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def with_trained_settings(name: str, given: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """The settings to evaluate with: the checkpoint's, and those given instead; prints where they differ."""
    kind = TASKS[name].__name__
    if not trained:
        return given
    if trained["task"] != kind:
        print(f"the checkpoint was trained on {trained['task']}, and is evaluated on {kind}")
        return given
    settings = {key: value for key, value in trained.items() if key != "task"}
    for key in given.keys() & settings.keys():
        if given[key] != settings[key]:
            print(f"the checkpoint was trained with {key}={settings[key]}, and is evaluated with {given[key]}")
    return settings | given


def main(arguments: list[str] | None = None) -> list[Score]:
    options = parse(Arguments, __doc__, arguments, positional=POSITIONAL)
    config = AutoConfig.from_pretrained(options.model)
    given = options.window_size or ([config.sleep.window_size] if isinstance(config, SleepLMConfig) else [])
    settings = with_trained_settings(options.task, options.task_settings, trained_on(options.model))
    task = make_task(options.task, settings, options.model, min(given, default=None))
    vocabulary = config.get_text_config().vocab_size
    if task.vocab_size > vocabulary:
        raise SystemExit(
            f"{task} has {task.vocab_size} tokens, and {options.model} knows {vocabulary}: give the --task-settings "
            "that it was trained with"
        )
    run = RunFolder(options.output, vars(options))
    sizes = given or [task.window_size]
    model = AutoModelForSleepLM.from_pretrained(
        options.model, sleep={"window_size": max(sizes)}, dtype="bfloat16" if options.bf16 else "float32"
    )
    evaluation = SleepTrainingArguments(
        output_dir=str(run.path),
        per_device_eval_batch_size=options.batch_size,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to="none",
        disable_tqdm=True,
    )
    rows = task.dataset(options.problems, seed=options.seed, split="test")
    trainer = SleepTrainer(model, evaluation, eval_dataset=rows, task=task, callbacks=[run])
    generates = options.task == "gsm_infinite"
    scores, lines = [], {}
    for size in sizes:
        if generates:
            generation = GenerationEvaluation(trainer, generation_rows(rows, size), (), options.batch_size)
            trainer.add_callback(generation)
        for passes in options.sleep_passes or [model.config.sleep.sleep_passes]:
            if generates:
                generation.sleep_passes = (passes,)
            with model.sleeping(window_size=size, sleep_passes=passes):
                metrics = trainer.evaluate()
            mine = (generation_scores if generates else forced_scores)(metrics, task, rows, passes)
            scores += [{"task": options.task, "L": size} | score for score in mine]
            lines[f"L = {size}, N = {passes}"] = by_difficulty(mine)
        if generates:
            lines[f"L = {size}, last window alone"] = by_difficulty(mine, "last_window")
            trainer.remove_callback(generation)
    if run.writes:
        write_file(run.path / "results.json", json.dumps(scores, indent=1) + "\n")
        print(f"\n{table(lines, 'difficulty')}\n\n{plot(run, lines, 'difficulty')}")
    return scores


if __name__ == "__main__":
    main()
