"""`hf-sleep state`: look at memories that were saved."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table

from .app import app, errors_in_a_line
from .loading import load_model, load_state
from .options import Json, with_model
from .show import as_json, console, facts, print_sources, printable, short, table

if TYPE_CHECKING:
    from ..state import SleepState

File = Annotated[Path, typer.Argument(metavar="FILE", help="A memory that a session, or `SleepState`, saved.")]
YEAR_3000 = 32_503_680_000
"""In seconds since 1970. No clock of a file that is later is believed."""
state = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Show, check and compare memories.")
app.add_typer(state, name="state")


@state.command()
def show(file: File, *, json: Json = False) -> None:
    """Show what a memory holds and where it comes from. No model is loaded."""
    with errors_in_a_line():
        found = load_state(file)
    held = described(found)
    if json:
        as_json({"file": str(file), **held})
        return
    rows = facts(str(file))
    for name, text in _lines(held):
        rows.add_row(name, text)
    console().print(rows)
    print_sources(held["sources"])


def _lines(held: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What `show` says of a memory, a name and a text a line."""
    rows, settings = held["rows"], held["settings"]
    if len(rows) > 1:
        yield "sequences", f"{len(rows):,}"
    tokens, fill, sleeps = (", ".join(f"{row[name]:,}" for row in rows) for name in ("seen", "fill", "sleeps"))
    yield "tokens", f"{tokens}, of them {fill} in the window of {settings['window_size']:,}"
    passes = sorted(set(held["sleep_passes"]))
    yield "sleeps", sleeps + (f", N = {' or '.join(map(str, passes))}" if passes else "")
    kv, fast = short(held["kv_bytes"], "B"), short(held["fast_weight_bytes"], "B")
    yield "memory", f"{short(held['bytes'], 'B')}: {kv} of KV, {fast} of fast weights"
    yield "model", printable(f"fingerprint {held['fingerprint'][:12]}, {held['dtype'].removeprefix('torch.')}")
    yield "settings", ", ".join(f"{name}={value}" for name, value in settings.items() if name != "window_size")
    if held["saved"] is not None:
        yield "saved", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held["saved"]))


@state.command()
@with_model
def verify(
    file: File,
    *,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also check that this model can continue it.")
    ] = None,
    json: Json = False,
    **how: Any,
) -> None:
    """Check that a memory is whole, and belongs to a model. The exit code is 0 where it does."""
    with errors_in_a_line():
        found = load_state(file)
        if model is not None:
            _check_continues(found, model, file, how)
    if json:
        as_json({"file": str(file), "whole": True, "model": model})
        return
    typer.echo(f"{file} is whole" + ("." if model is None else f", and {model} can continue it."))


def _check_continues(found: "SleepState", model: str, file: Path, how: dict[str, Any]) -> None:
    """Raise `ValueError` unless a model, with its tokenizer, can continue a memory."""
    from ..session import SleepSession

    loaded, tokenizer = load_model(model, how, found)
    if found.about is not None and len(found.rows) == 1 and "tokenizer" in found.about:
        SleepSession.of_state(found, loaded, tokenizer, name=str(file))
    else:
        found.to_cache(loaded)


@state.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A memory.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    *,
    json: Json = False,
) -> None:
    """Compare two memories: counters, settings, fast weights, and what was read.

    The distance of fast weights is the Frobenius norm of B - A over that of A. The exit code is 0 either way.
    """
    with errors_in_a_line():
        first, second = load_state(a), load_state(b)
    one, other = described(first), described(second)
    differ = {name: [one[name], other[name]] for name in one if name != "saved" and one[name] != other[name]}
    tensors_agree = same_tensors(first, second)
    same = tensors_agree and not differ
    distances = fast_weight_distances(first, second)
    if json:
        as_json({"identical": same, "same_tensors": tensors_agree, "differ": differ, "fast_weights": distances})
    elif same:
        typer.echo("The memories are identical.")
    else:
        if tensors_agree:
            typer.echo("All tensors are identical; what is known of them is not.\n")
        for part in _differences(dict(_lines(one)), dict(_lines(other)), one, other, distances):
            console().print(part)


def _differences(
    one: dict[str, str], other: dict[str, str], a: dict[str, Any], b: dict[str, Any], distances: dict[str, float | None]
) -> Iterator[RenderableType]:
    """Render what differs: lines, fast weights, and texts."""
    rows = table("", "A", "B")
    for name in (name for name in one | other if one.get(name) != other.get(name)):
        rows.add_row(name, one.get(name, ""), other.get(name, ""))
    if rows.row_count:
        yield rows
        yield ""
    if distances:
        rows = table("fast weights", ">distance")
        for name, distance in distances.items():
            rows.add_row(name, "-" if distance is None else f"{distance:.4f}")
        yield rows
    if a["sources"] != b["sources"]:
        yield ""
        yield _texts(a["sources"], b["sources"])


def _texts(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> Table:
    """Which texts were read into which memory."""
    rows = table("read", ">tokens", "sha256", "in")
    for source in [*a, *(source for source in b if source not in a)]:
        where = "both" if source in a and source in b else "A" if source in a else "B"
        rows.add_row(printable(source["title"]), f"{source['tokens']:,}", printable(source["sha256"][:12]), where)
    return rows


def described(state: "SleepState") -> dict[str, Any]:
    """A memory without its tensors, JSON-ready. What a file says about itself is taken where it makes sense."""
    about = state.about or {}
    fast = fast_slots(state)
    sizes = {name: t.numel() * t.element_size() for name, t in state.tensors.items()}
    carried = {name: size for name, size in sizes.items() if name.startswith("layers.")}
    kv = sum(size for name, size in carried.items() if _slot(name) not in fast)
    passes, saved = about.get("passes"), about.get("saved")
    return {
        "rows": [asdict(row) for row in state.rows],
        "columns": state.columns,
        "settings": state.settings,
        "dtype": state.dtype,
        "fingerprint": state.fingerprint,
        "tokenizer": about.get("tokenizer"),
        "bytes": state.num_bytes(),
        "kv_bytes": kv,
        "fast_weight_bytes": sum(carried.values()) - kv,
        "sleep_passes": [n for n in passes if type(n) is int] if isinstance(passes, list) else [],
        "saved": saved if isinstance(saved, float) and 0 <= saved < YEAR_3000 else None,
        "sources": _sources(about.get("sources")),
    }


def _sources(given: Any) -> list[dict[str, Any]]:
    kinds = {"title": str, "tokens": int, "sha256": str}
    rows = [row for row in given if isinstance(row, dict)] if isinstance(given, list) else []
    return [row for row in rows if {name: type(value) for name, value in row.items()} == kinds]


def _slot(name: str) -> int:
    """The place in the running order of a tensor `layers.SLOT.0` or `layers.SLOT.1`."""
    return int(name.split(".")[1])


def fast_slots(state: "SleepState") -> dict[int, str]:
    """Places that carry fast weights, in the running order, and what stands there.

    They have a recurrent state `[B, H, K, V]` and the tail of a convolution `[B, D, W]`, where KV is `[B, H, T, D]`
    twice.
    """
    tails = [name for name, t in state.tensors.items() if name.startswith("layers.") and name.endswith(".1")]
    slots = sorted(_slot(name) for name in tails if state.tensors[name].dim() == 3)
    names: list[str] = []
    for layer in range(max(slots, default=-1) + 1):
        names.append(f"layer {layer}")
        if layer in state.settings["block_layers"]:
            names.append(f"block after layer {layer}")
    return {slot: names[slot] for slot in slots}


def fast_weight_distances(a: "SleepState", b: "SleepState") -> dict[str, float | None]:
    """Frobenius norm of B - A over that of A, for the recurrent states that both have.

    `None` where they cannot be compared: of different shapes, or where A's is zero and B's is not.
    """
    distances: dict[str, float | None] = {}
    for slot, name in fast_slots(a).items():
        key = f"layers.{slot}.0"
        if key in b.tensors:
            one, other = a.tensors[key].double(), b.tensors[key].double()
            if one.shape != other.shape:
                distances[name] = None
                continue
            norm, apart = one.norm().item(), (other - one).norm().item()
            distances[name] = apart / norm if norm else None if apart else 0.0
    return distances


def same_tensors(a: "SleepState", b: "SleepState") -> bool:
    """Whether two memories hold the same values, bit for bit."""
    pairs = ((a.tensors[name], b.tensors.get(name)) for name in a.tensors)
    same = all(y is not None and x.dtype == y.dtype and x.shape == y.shape and bool((x == y).all()) for x, y in pairs)
    return same and a.tensors.keys() == b.tensors.keys()
