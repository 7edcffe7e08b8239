"""The `hf-sleep` command. Torch and transformers are imported where they are used: help needs neither."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .version import __version__

if TYPE_CHECKING:
    from .info import SleepInfo

# Choices and defaults are those of SleepConfig, for which the help does not wait; a test holds them together.
SETTINGS = {
    "window_size": "L, tokens read between two sleeps. [default: 512]",
    "sleep_passes": "N, passes over a full window, the ordinary read among them. [default: 2]",
    "eviction": "What a sleep drops of the KV cache: hard or sliding. [default: hard]",
    "num_sink_tokens": "First tokens of a sequence, whose KV is never dropped. [default: 0]",
    "loop_layers": "Layers that all passes run; 7:21 is 7 to 20. Without it every layer, or the range that the base's "
    "config names.",
    "num_blocks": "Blocks of fast weights to inject, evenly spaced. Without it one per four layers; none where the "
    "base has linear-attention layers.",
    "block_layers": "Instead, the layers after which to inject them: 3,9,15.",
    "block_kind": "Kind of the blocks: jet or gated_delta_net. [default: jet]",
    "block_num_heads": "Heads of a block. Without it as many as fit a third of the hidden size.",
    "block_head_dim": "Key width of a head. Without it the base's own.",
    "block_expand_v": "Value width of a head over its key width. [default: 2.0]",
}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _setting(field: str, **kwargs: Any) -> Any:
    """An option that sets a field of `SleepConfig`."""
    return typer.Option(f"--{field.replace('_', '-')}", help=SETTINGS[field], show_default=False, **kwargs)


def _integers(separator: str) -> Callable[[str | None], tuple[int, ...] | None]:
    def read(value: str | None) -> tuple[int, ...] | None:
        try:
            return None if value is None else tuple(int(part) for part in value.split(separator))
        except ValueError:
            raise typer.BadParameter(f"{value!r} is not a row of integers with {separator!r} between them") from None

    return read


def _read_dtype(name: str | None) -> Any:
    if name is None:
        return None
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise typer.BadParameter(f"{name!r} is not a floating dtype of torch of 16 bits or more, such as bfloat16")
    return dtype


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Language models that sleep: a full context window goes into fast weights, and its KV cache is dropped."""


@app.command()
def info(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id or folder, of a base model or of a sleep checkpoint.")
    ],
    window_size: Annotated[int | None, _setting("window_size")] = None,
    sleep_passes: Annotated[int | None, _setting("sleep_passes")] = None,
    eviction: Annotated[str | None, _setting("eviction")] = None,
    num_sink_tokens: Annotated[int | None, _setting("num_sink_tokens")] = None,
    loop_layers: Annotated[str | None, _setting("loop_layers", metavar="A:B", callback=_integers(":"))] = None,
    num_blocks: Annotated[int | None, _setting("num_blocks")] = None,
    block_layers: Annotated[str | None, _setting("block_layers", metavar="A,B,...", callback=_integers(","))] = None,
    block_kind: Annotated[str | None, _setting("block_kind")] = None,
    block_num_heads: Annotated[int | None, _setting("block_num_heads")] = None,
    block_head_dim: Annotated[int | None, _setting("block_head_dim")] = None,
    block_expand_v: Annotated[float | None, _setting("block_expand_v")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            callback=_read_dtype, metavar="<str>", help="Of activations. Without it the model's, or bfloat16."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes and FLOPs.")] = False,
) -> None:
    """Show what MODEL would be with sleep: layers, parameters, memory and cost.

    Reads its config.json alone, so a model of any size takes seconds. A setting that is left out is the library's
    default, or what a sleep checkpoint was saved with; of a sleep checkpoint the blocks cannot be changed.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    from . import models  # noqa: F401 - registers them with AutoConfig, as hf_sleep/__init__.py does elsewhere
    from .info import describe

    asked = {field: context.params[field] for field in SETTINGS if context.params[field] is not None}
    logging.set_verbosity_error()
    try:
        if (model.startswith((".", "/", "~")) or model.count("/") > 1) and not Path(model).exists():
            raise ValueError(f"there is no folder {model}")
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        found = describe(config, asked, context.params["dtype"])
    except (ValueError, OSError) as error:
        typer.echo("Error: " + " ".join(str(error).split()), err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    console = Console(highlight=False)
    for part in _view(found, console.width):
        console.print(part)


def _view(found: "SleepInfo", width: int) -> Iterator[RenderableType]:
    """What `hf-sleep info` shows, part by part, in lines of `width` characters."""
    base = f"{found.model_type}, {sum(found.layer_kinds.values())} layers of width {found.hidden_size:,}"
    yield Text(found.name or found.model_type, "bold")
    yield f"{'sleep checkpoint of ' if found.is_checkpoint else ''}{base}, {_parameters(found.parameters)}"
    if found.added_parameters:
        yield f"sleep adds {_parameters(found.added_parameters)}, {found.added_percent:.2g} %"
    else:
        yield "sleep adds no parameters: the linear-attention layers are its fast weights"
    yield ""
    yield from _strip(found, width)
    kv = f"{found.kv_tokens:,} tokens of {found.kv_bytes_per_token:,} bytes"
    memory = [
        ("KV cache, at most", found.kv_bytes, kv),
        ("fast weights", found.fast_weight_bytes, "never grow"),
        ("for the next sleep", found.window_bytes, "the window's hidden states, and its start"),
        ("together, at most", found.num_bytes, "however much is read"),
    ]
    if found.base_kv_bytes:
        memory.append(
            ("base, no sleep", found.base_kv_bytes, f"KV cache at its limit of {found.max_positions:,} tokens")
        )
    yield _table(f"Memory of one sequence ({found.dtype})", memory, "B")
    yield ""
    more = found.sleep.sleep_passes - 1
    worth = f"{found.sleep_in_reads:.2f} x the read = {found.sleep_in_tokens:,.0f} decoded tokens"
    cost = [
        ("decode a token", found.token_flops, "never grows"),
        ("read a window", found.read_flops, f"{found.sleep.window_size:,} tokens, one pass"),
        (f"sleep, {_number(more, 'more pass', 'more passes')}", found.sleep_flops, worth),
    ]
    yield _table("Compute of one sequence (FLOPs, not seconds)", cost, "FLOPs")


def _number(count: int | None, thing: str, things: str = "") -> str:
    return f"{count} {thing if count == 1 else things or thing + 's'}"


def _strip(found: "SleepInfo", width: int) -> Iterator[RenderableType]:
    """All layers in running order, a letter each, in groups of ten, with `=` under what loops; and the legend."""
    sleep, groups = found.sleep, []
    for i, slot in enumerate(found.slots):
        if slot.role in ("attention", "linear") and slot.index % 10 == 0:
            groups.append(["", ""])
        groups[-1][0] += "+" if slot.role == "block" else (slot.kind or slot.role)[0].upper()
        groups[-1][1] += "=" if i in found.loop else " "
    # A block behind each of ten layers makes a group twice as long.
    per_row = max(1, (width - 7) // (1 + max(len(marks) for marks, _ in groups)))
    for first in range(0, len(groups), per_row):
        marks, loops = zip(*groups[first : first + per_row], strict=True)
        yield Text(f"{10 * first:5}  {' '.join(marks)}\n{'':7}{' '.join(loops)}")
    legend = [
        f"{kind[0].upper()}  {kind.replace('_', ' ')}, {_number(count, 'layer')}"
        for kind, count in found.layer_kinds.items()
    ]
    if sleep.block_layers and sleep.block_head_dim:
        values = round(sleep.block_head_dim * sleep.block_expand_v)
        legend.append(
            f"+  {sleep.block_kind} block, injected after layers {', '.join(map(str, sleep.block_layers))}: "
            f"{_number(sleep.block_num_heads, 'head')} of {sleep.block_head_dim} keys x {values} values"
        )
    if any(slot.role == "norm" for slot in found.slots):
        legend.append("N  the final norm, which closes every pass")
    passes = _number(sleep.sleep_passes, "pass", "passes")
    legend.append(f"=  layers {found.loop_text}: {passes} over every window")
    sinks = f", {sleep.num_sink_tokens} sink tokens" if sleep.num_sink_tokens else ""
    legend.append(f"   sleeps after every {sleep.window_size:,} tokens; {sleep.eviction} eviction{sinks}")
    for line in legend:
        grid = Table.grid()
        grid.add_row(line[:3], line[3:])
        yield Padding(grid, (0, 0, 0, 4), expand=False)
    yield ""


def _table(title: str, rows: list[tuple[str, int, str]], unit: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(min_width=20)
    table.add_column(min_width=11, justify="right")
    table.add_column()
    for name, count, note in rows:
        table.add_row(name, _short(count, unit), note)
    return table


def _parameters(count: int) -> str:
    return _short(count, " parameters", "kMBT")


def _short(count: float, unit: str, prefixes: str = "kMGTPE") -> str:
    """Three digits and a decimal prefix: `11.8 MB`."""
    power = 0
    while count >= 999.5:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {(['', *prefixes][power] + unit).strip()}"
