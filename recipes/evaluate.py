"""How often is a checkpoint right, by difficulty, N and L? Any base or sleep checkpoint, any task of hf_sleep.data.

python recipes/evaluate.py runs/finetune_gsm/model gsm_infinite --task-settings '{"ops": [1, 8]}'
python recipes/evaluate.py runs/khop/N2-seed0 khop --sleep-passes 1 2 3 --window-size 8 16
accelerate launch recipes/evaluate.py Qwen/Qwen3-0.6B gsm_infinite --problems 1600 --window-size 2000 4000 --bf16

A base is given new blocks, which add nothing: it is the base with its window cut. Put more tokens in --window-size than
a row has, and it is the base itself. GSM-Infinite is generated greedily and must match to the end of the text, which
a base that was not trained on it seldom ends; beside it stands what the last window alone tells, without a memory. The
other tasks are teacher-forced. All N and L read the same rows. A checkpoint of a recipe carries its task's settings
(task.json), which are used where none are given; what differs is said.
Writes config.json, metrics.jsonl, results.json and accuracy.png.
"""

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from run_folder import RunFolder
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import cached_file

from hf_sleep import AutoModelForSleepLM, SleepLMConfig
from hf_sleep.data import Depo, GSMInfinite, KHop, Rule110
from hf_sleep.data.task import Row, Task
from hf_sleep.files import write_file
from hf_sleep.labels import IGNORED
from hf_sleep.training import GenerationEvaluation, SleepTrainer, SleepTrainingArguments
from hf_sleep.training.trainer import TASK_FILE

TASKS = {"gsm_infinite": GSMInfinite, "rule110": Rule110, "depo": Depo, "khop": KHop}
Score = dict[str, Any]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub id or folder, of a base or of a model that sleeps")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument(
        "--task-settings", type=json.loads, default={}, help="the task's fields as JSON (default: the checkpoint's)"
    )
    parser.add_argument("--sleep-passes", type=int, nargs="+", help="each N (default: the checkpoint's)")
    parser.add_argument(
        "--window-size", type=int, nargs="+", help="each L, in tokens (default: the checkpoint's, of a base the task's)"
    )
    parser.add_argument("--problems", type=int, default=200, help="test rows (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows read at once (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=1, help="of the test rows (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/evaluate"))
    return parser.parse_args(arguments)


def make_task(name: str, settings: dict[str, Any], model: str, window_size: int | None) -> Task:
    """A task by its name; `settings` come from JSON, without tuples. GSM-Infinite is laid out for `window_size`."""
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    unknown = settings.keys() - {field.name for field in dataclasses.fields(TASKS[name])}
    if unknown:
        raise SystemExit(f"--task-settings: {TASKS[name].__name__} has no field {', '.join(sorted(unknown))}")
    if name == "gsm_infinite":
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


def generation_rows(rows: Sequence[Row], window_size: int) -> list[Row]:
    """GSM-Infinite rows for `GenerationEvaluation`, each as it is and without what came before its last window.

    The difficulty names what is read and the mode, too.
    """
    made = []
    for row in rows:
        prompt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORED]
        end = prompt[(len(prompt) - 1) // window_size * window_size :]
        for reads, ids in (("all", prompt), ("last_window", end)):
            made.append(row | {"prompt_ids": ids, "difficulty": f"{reads}_{row['mode']}_{row['difficulty']}"})
    return made


def generation_scores(metrics: dict[str, float], task: GSMInfinite, rows: Sequence[Row], passes: int) -> list[Score]:
    """What was generated for `generation_rows`, by mode and operations, with the majority answer's share as chance."""
    counts = Counter((row["mode"], row["difficulty"]) for row in rows)
    return [
        {
            "reads": reads,
            "mode": mode,
            "difficulty": op,
            "N": passes,
            "accuracy": metrics[f"eval_generate_accuracy_{reads}_{mode}_{op}_passes_{passes}"],
            "chance": task.chance(op, mode),
            "n": n,
        }
        for reads in ("all", "last_window")
        for (mode, op), n in sorted(counts.items())
    ]


def forced_scores(metrics: dict[str, float], task: Task, rows: Sequence[Row], passes: int) -> list[Score]:
    """What `SleepTrainer.evaluate` returned, by difficulty; a row may hold several answers."""
    counts = Counter(difficulty for row in rows for difficulty, _ in task.answers(row))
    return [
        {
            "reads": "all",
            "difficulty": difficulty,
            "N": passes,
            "accuracy": metrics[f"eval_accuracy_{difficulty}"],
            "chance": task.chance(difficulty),
            "n": n,
        }
        for difficulty, n in sorted(counts.items())
    ]


def by_difficulty(scores: list[Score], reads: str = "all") -> list[Score]:
    """The scores of what reads everything, or the last window alone, with the modes together."""
    merged: dict[tuple[int, int], Score] = {}
    for score in scores:
        if score["reads"] != reads:
            continue
        key = {name: score[name] for name in ("difficulty", "N")}
        into = merged.setdefault(tuple(key.values()), key | {"accuracy": 0.0, "chance": 0.0, "n": 0})
        n = into["n"] + score["n"]
        for name in ("accuracy", "chance"):
            into[name] = (into[name] * into["n"] + score[name] * score["n"]) / n
        into["n"] = n
    return list(merged.values())


def table(lines: dict[str, list[Score]], difficulty: str) -> str:
    """Markdown: a line for each label with accuracy by difficulty, then chance and the number of answers."""
    first = next(iter(lines.values()))
    cells = [("", [f"{difficulty} {score['difficulty']}" for score in first])]
    cells += [(label, [f"{score['accuracy']:.2f}" for score in scores]) for label, scores in lines.items()]
    cells.append(("chance", [f"{score['chance']:.2f}" for score in first]))
    cells.append(("n", [str(score["n"]) for score in first]))
    text = [f"| {label} | {' | '.join(row)} |" for label, row in cells]
    return "\n".join([text[0], "|---" * (len(first) + 1) + "|", *text[1:]])


def plot(run: RunFolder, lines: dict[str, list[Score]], difficulty: str) -> Path:
    """Accuracy by difficulty, a line for each label."""
    accuracy = {label: {s["difficulty"]: [s["accuracy"]] for s in scores} for label, scores in lines.items()}
    return run.plot(accuracy, {s["difficulty"]: s["chance"] for s in next(iter(lines.values()))}, difficulty)


def main(arguments: list[str] | None = None) -> list[Score]:
    options = parse_arguments(arguments)
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
            model.config.sleep.window_size, model.config.sleep.sleep_passes = size, passes
            if generates:
                generation.sleep_passes = (passes,)
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
