"""Numbers and tables as the commands show them."""

import json
import re
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..report import Report


def console(stderr: bool = False) -> Console:
    """A terminal without colours of its own choice, or what stands in for one."""
    return Console(highlight=False, markup=False, emoji=False, stderr=stderr)


def as_json(values: Any) -> None:
    """Print JSON."""
    typer.echo(json.dumps(values, indent=2))


def as_line(values: Any) -> None:
    """Print JSON in one line, at once."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


class Typed:
    """Writes text as it comes; on a terminal, no word is broken at its edge."""

    def __init__(self) -> None:
        self.width = console().width if sys.stdout.isatty() else 0
        self.column = 0

    def __call__(self, text: str) -> None:
        for part in re.findall(r"\n|[^\S\n]+|\S+", text):
            if part == "\n":
                self.column = 0
            elif self.width and self.column + cell_len(part) > self.width:
                part, self.column = "\n" + part.lstrip(), cell_len(part.lstrip())
            else:
                self.column += cell_len(part)
            sys.stdout.write(part)
        sys.stdout.flush()


def printable(text: str) -> str:
    """A text that somebody else may have written, as one line that does nothing to a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def table(*columns: str, title: str | None = None) -> Table:
    """A table with headings, of which those that begin with `>` stand on the right."""
    made = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for name in columns:
        made.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    return made


def facts(title: str | None = None) -> Table:
    """A table of a name and a value a row."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    made.add_column(no_wrap=True)
    made.add_column()
    return made


def number(count: int | None, thing: str, things: str = "") -> str:
    """`1 pass`, `2 passes`."""
    return f"{count:,} {thing if count == 1 else things or thing + 's'}"


def parameters(count: int) -> str:
    """`135 M parameters`."""
    return short(count, " parameters", "kMBT")


def short(count: float, unit: str, prefixes: str = "kMGTPE") -> str:
    """Write a number with three digits and a decimal prefix: `11.8 MB`."""
    power = 0
    while count >= 999.5:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {(['', *prefixes][power] + unit).strip()}"


def status(report: "Report", window_size: int) -> str:
    """A session in a line: `window 143/512, 1,167 tokens read, 2 sleeps, 14.2 MB`."""
    read = number(report.tokens, "token")
    window = f"window {report.window_tokens:,}/{window_size:,}"
    return f"[{window} · {read} · {number(report.sleeps, 'sleep')} · {short(report.num_bytes, 'B')}]"


def print_report(report: "Report", window_size: int) -> None:
    """Print what a session has read, and what it took."""
    rows = facts()
    each = sorted(set(report.sleep_passes))
    passes = f", N = {' or '.join(map(str, each))}" if each else ""
    rows.add_row("tokens", f"{report.tokens:,}, of them {report.window_tokens:,} in the window of {window_size:,}")
    rows.add_row("sleeps", f"{report.sleeps:,}{passes}")
    rows.add_row("seconds", f"{report.seconds_awake:.1f} awake, {report.seconds_asleep:.1f} asleep")
    kv, fast = short(report.kv_bytes, "B"), short(report.fast_weight_bytes, "B")
    rows.add_row("memory", f"{short(report.num_bytes, 'B')}: {kv} of KV, {fast} of fast weights")
    shown = console()
    shown.print(rows)
    print_sources([asdict(source) for source in report.sources])


def print_sources(sources: list[dict[str, Any]]) -> None:
    """Print what was read, a line a text."""
    if sources:
        rows = table("read", ">tokens", "sha256")
        for source in sources:
            rows.add_row(printable(source["title"]), f"{source['tokens']:,}", printable(source["sha256"][:12]))
        shown = console()
        shown.print("")
        shown.print(rows)
