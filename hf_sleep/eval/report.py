"""What was measured, as tables in Markdown and as plots."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_file
from .answers import Score
from .forgetting import Forgetting
from .position import FULL, WINDOW, ZEROED, PositionLosses

NAMES = {
    "last_window": "last window alone",
    "full": "full context",
    "same_bytes": "base, KV of as many bytes",
}

STYLES = {ZEROED: ":", WINDOW: "--", FULL: "k-"}
"""How controls are drawn, which may lie on each other."""


def by_difficulty(scores: Sequence[Score], reads: str = "all") -> list[Score]:
    """The scores of one way of reading, with the modes together."""
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


def lines_of(scores: Sequence[Score]) -> dict[str, list[Score]]:
    """Scores by difficulty of each way of reading, under its name in words: each N first, then the controls."""
    lines = {}
    for n in sorted({score["N"] for score in scores}):
        if mine := by_difficulty([score for score in scores if score["N"] == n]):
            lines[f"N = {n}"] = mine
    return lines | {name: found for reads, name in NAMES.items() if (found := by_difficulty(scores, reads))}


def table(lines: Mapping[str, Sequence[Score]], difficulty: str) -> str:
    """Markdown: a line for each label with accuracy by difficulty, then chance and the number of answers."""
    first = next(iter(lines.values()))
    cells = [("", [f"{difficulty} {score['difficulty']}" for score in first])]
    cells += [(label, [f"{score['accuracy']:.2f}" for score in scores]) for label, scores in lines.items()]
    cells.append(("chance", [f"{score['chance']:.2f}" for score in first]))
    cells.append(("n", [str(score["n"]) for score in first]))
    return markdown([[label, *row] for label, row in cells])


def position_table(found: PositionLosses) -> str:
    """Markdown: the loss of each way of reading in the first window and in the others, and the share recovered."""
    rows = [["", "first window", "other windows", "recovered (95 %)", "by memory (95 %)"]]
    for reads, losses in found.losses.items():
        first, others = losses[:, : found.window_size].mean().item(), losses[:, found.window_size :].mean().item()
        shares = ["", ""]
        if reads not in (FULL, WINDOW):
            shares = [_share(*found.recovered(reads, beyond)) for beyond in (WINDOW, ZEROED)]
        rows.append([reads, f"{first:.3f}", f"{others:.3f}", *shares])
    return markdown(rows)


def forgetting_table(found: Forgetting) -> str:
    """Markdown: by the windows of other text in between, losses, what is left of the text, and what memory gains."""
    rows = [["windows in between", *map(str, found.between)]]
    ways = {"loss": found.losses, "memory of the others alone": found.others, "memory zeroed": found.zeroed}
    for name, losses in ways.items():
        rows.append([name, *(f"{loss:.3f}" for loss in losses.mean((0, 2)).tolist())])
    for name, of in (("left of the text (95 %)", found.left()), ("gained by all memory (95 %)", found.gained())):
        rows.append(
            [name, *(f"{m:.3f}" if math.isnan(low) else f"{m:.3f} ({low:.3f} to {high:.3f})" for m, low, high in of)]
        )
    return markdown(rows)


def _share(share: float, low: float, high: float) -> str:
    if math.isnan(share):
        return "nothing to recover"
    return f"{share:.1%}" if math.isnan(low) or math.isnan(high) else f"{share:.1%} ({low:.1%} to {high:.1%})"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table of cells whose first row is its head."""
    text = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([text[0], "|---" * len(rows[0]) + "|", *text[1:]])


def plot_positions(found: PositionLosses, path: Path) -> None:
    """Draw the loss over positions, averaged over eighths of a window.

    Raises:
        ImportError: without matplotlib.
    """
    figure, axes = _figure()
    step = max(1, found.window_size // 8)
    for reads, losses in found.losses.items():
        parts = losses.split(step, dim=1)
        x = [(i * step + part.shape[1] / 2) / found.window_size for i, part in enumerate(parts)]
        axes.plot(x, [part.mean().item() for part in parts], STYLES.get(reads, "-"), label=reads)
    axes.set(xlabel=f"position in windows of {found.window_size} tokens", ylabel="next-token loss in nats")
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_forgetting(found: Forgetting, path: Path) -> None:
    """Draw what is left of a text, by the windows of other text in between, with its 95 % interval.

    Raises:
        ImportError: without matplotlib.
    """
    figure, axes = _figure()
    mean, low, high = zip(*found.left(), strict=True)
    axes.plot(found.between, mean, "o-")
    axes.fill_between(found.between, low, high, alpha=0.2)
    axes.axhline(0, color="k", linestyle=":")
    axes.set(xlabel="windows of other text in between", ylabel="left of the text, nats per token")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(-0.1, 1.2 * found.between[-1])
    axes.set_xticks(found.between, [str(windows) for windows in found.between])
    _save(figure, path)


def plot_scores(lines: Mapping[str, Sequence[Score]], difficulty: str, path: Path) -> None:
    """Draw accuracy by difficulty, a line for each label, and chance.

    Args:
        lines: as `lines_of` makes them.
        difficulty: name of the horizontal axis.
        path: a file that matplotlib can write.

    Raises:
        ImportError: without matplotlib.
    """
    figure, axes = _figure()
    for label, scores in lines.items():
        style = {"linestyle": "--" if label in NAMES.values() else "-", "marker": "o"}
        axes.plot([s["difficulty"] for s in scores], [s["accuracy"] for s in scores], label=label, **style)
    first = next(iter(lines.values()))
    x = [score["difficulty"] for score in first]
    axes.plot(x, [score["chance"] for score in first], "k:", label="chance")
    is_wide = len(x) > 1 and min(x) > 0 and max(x) / min(x) > 16
    axes.set(xlabel=difficulty, ylabel="accuracy", ylim=(-0.02, 1.02), xscale="log" if is_wide else "linear")
    axes.set_xticks(x, [str(value) for value in x])
    axes.legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format=path.suffix[1:] or None)
    write_file(path, file.getvalue())


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), constrained_layout=True)
    return figure, figure.subplots()
