"""Accuracy by difficulty, of what was generated or teacher-forced, as table and plot."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_sleep.data import GSMInfinite
from hf_sleep.data.task import Row, Task
from hf_sleep.labels import IGNORED

from .run_folder import RunFolder

Score = dict[str, Any]


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
    """Score what was generated for `generation_rows`, by mode and operations; chance is the majority answer's share."""
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
    """Score what `SleepTrainer.evaluate` returned, by difficulty; a row may hold several answers."""
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
