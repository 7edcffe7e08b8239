"""`hf-sleep info`: what a model would be with sleep."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .app import app, errors_in_a_line
from .loading import check_folder
from .options import Model, Revision, read_dtype, with_settings
from .show import as_json, console, number, parameters, short

if TYPE_CHECKING:
    from ..info import SleepInfo


@app.command()
@with_settings
def info(
    model: Model,
    *,
    dtype: Annotated[
        Any,
        typer.Option(parser=read_dtype, metavar="<str>", help="Of activations. By default the model's, or bfloat16."),
    ] = None,
    revision: Revision = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes and FLOPs.")] = False,
    **settings: Any,
) -> None:
    """Show what MODEL would be with sleep: layers, parameters, memory and cost.

    Reads its config.json alone, so a model of any size takes seconds. A setting that is left out is the library's
    default, or what a sleep checkpoint was saved with. The blocks of a sleep checkpoint cannot be changed.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    from .. import bases  # noqa: F401 - registers them with AutoConfig, as hf_sleep/__init__.py does elsewhere
    from ..info import describe

    asked = {name: value for name, value in settings.items() if value is not None}
    logging.set_verbosity_error()
    with errors_in_a_line():
        check_folder(model)
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        found = describe(config, asked, dtype)
    if json:
        as_json(found.to_dict())
        return
    shown = console()
    for part in _view(found, shown.width):
        shown.print(part)


def _view(found: "SleepInfo", width: int) -> Iterator[RenderableType]:
    """Render what `hf-sleep info` shows, part by part, in lines of `width` characters."""
    base = f"{found.model_type}, {sum(found.layer_kinds.values())} layers of width {found.hidden_size:,}"
    yield Text(found.name or found.model_type, "bold")
    yield f"{'sleep checkpoint of ' if found.is_checkpoint else ''}{base}, {parameters(found.parameters)}"
    if found.added_parameters:
        yield f"sleep adds {parameters(found.added_parameters)}, {found.added_percent:.2g} %"
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
    more = found.passes - 1
    worth = f"{found.sleep_in_reads:.2f} x the read = {found.sleep_in_tokens:,.0f} decoded tokens"
    cost = [
        ("decode a token", found.token_flops, "never grows"),
        ("read a window", found.read_flops, f"{found.sleep.window_size:,} tokens, one pass"),
        (f"sleep, {number(more, 'more pass', 'more passes')}", found.sleep_flops, worth),
    ]
    yield _table("Compute of one sequence (FLOPs, not seconds)", cost, "FLOPs")


def _strip(found: "SleepInfo", width: int) -> Iterator[RenderableType]:
    """Render all layers in running order, a letter each, in groups of ten, with `=` under what loops; and a legend."""
    sleep, groups = found.sleep, []
    for i, slot in enumerate(found.slots):
        if slot.role in ("attention", "linear") and slot.index % 10 == 0:
            groups.append(["", ""])
        groups[-1][0] += "+" if slot.role == "block" else (slot.kind or slot.role)[0].upper()
        groups[-1][1] += "=" if i in found.loop else " "
    # A block after each of ten layers makes a group twice as long.
    per_row = max(1, (width - 7) // (1 + max(len(marks) for marks, _ in groups)))
    for first in range(0, len(groups), per_row):
        marks, loops = zip(*groups[first : first + per_row], strict=True)
        yield Text(f"{10 * first:5}  {' '.join(marks)}\n{'':7}{' '.join(loops)}")
    legend = [
        f"{kind[0].upper()}  {kind.replace('_', ' ')}, {number(count, 'layer')}"
        for kind, count in found.layer_kinds.items()
    ]
    if sleep.block_layers and sleep.block_head_dim:
        values = round(sleep.block_head_dim * sleep.block_expand_v)
        legend.append(
            f"+  {sleep.block_kind} block, injected after layers {', '.join(map(str, sleep.block_layers))}: "
            f"{number(sleep.block_num_heads, 'head')} of {sleep.block_head_dim} keys x {values} values"
        )
    if any(slot.role == "norm" for slot in found.slots):
        legend.append("N  the final norm, which closes every pass")
    passes = number(found.passes, "pass", "passes")
    between = "" if sleep.between == "none" else f", with a step between them: {sleep.between}"
    legend.append(f"=  layers {found.loop_text}: {passes} over every window{between}")
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
        table.add_row(name, short(count, unit), note)
    return table
