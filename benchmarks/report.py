"""Timing in turn, and rows of figures beside what they must be, for all parts of `make bench`."""

import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

console = Console(width=120)


class Report:
    """Rows of measured figures beside what they must be."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def add(self, what: str, measured: float, relation: str, target: float, detail: str) -> None:
        met = measured <= target if relation == "<=" else measured >= target
        self.rows.append(
            {"what": what, "measured": measured, "target": f"{relation} {target}", "met": met, "detail": detail}
        )
        console.print(f"{what}: {measured:.3f} (target {relation} {target}; {detail})", highlight=False)

    def table(self) -> Table:
        table = Table(title="Ratios of medians, one run", show_lines=True)
        for column in ("what", "measured", "target", "met", "from"):
            table.add_column(column)
        for row in self.rows:
            table.add_row(
                row["what"], f"{row['measured']:.3f}", row["target"], "yes" if row["met"] else "NO", row["detail"]
            )
        return table


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(functions: list[Callable[[], object]], turns: int) -> list[float]:
    """Median seconds of each, timed one after the other in every turn."""
    times = [[seconds(function) for function in functions] for _ in range(turns)]
    return [statistics.median(column) for column in zip(*times, strict=True)]
