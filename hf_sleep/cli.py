"""Command `hf-sleep`. Torch and transformers are imported where they are used: help needs neither."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .config import SETTINGS
from .serve.command import serve
from .version import __version__

if TYPE_CHECKING:
    from .info import SleepInfo
    from .suggest import LoopSuggestion

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _row(kind: type[int] | type[float], separator: str) -> Callable[[str], tuple[float, ...]]:
    def read(value: str) -> tuple[float, ...]:
        try:
            return tuple(kind(part) for part in value.split(separator))
        except ValueError:
            numbers = "integers" if kind is int else "numbers"
            raise typer.BadParameter(f"{value!r} is not a row of {numbers} with {separator!r} between them") from None

    return read


# How the settings are read that are no single number or word.
ROWS: dict[str, dict[str, Any]] = {
    "loop_layers": {"metavar": "A:B", "parser": _row(int, ":")},
    "block_layers": {"metavar": "A,B,...", "parser": _row(int, ",")},
    "block_half_lives": {"metavar": "A:B", "parser": _row(float, ":")},
}


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each setting of `SleepConfig`; it takes them as `**settings`, `None`: not given."""
    options = []
    for name, field in SETTINGS.items():
        numbers = [kind for kind in (int, float) if type(field.default) is kind or field.type == kind | None]
        kind: Any = numbers[0] if numbers else bool if field.type is bool else str
        shown = ":".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        default = "" if shown is None else f" [default: {shown}]"
        option = typer.Option(help=field.metadata["help"] + default, show_default=False, **ROWS.get(name, {}))
        annotation = Annotated[kind | None, option]
        options.append(Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    own = signature(command)
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    first, last = ([p for p in own.parameters.values() if p.kind is kind] for kind in kinds)
    command.__signature__ = own.replace(parameters=[*first, *options, *last])  # type: ignore[attr-defined]
    return command


def _read_dtype(name: str) -> Any:
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
@with_settings
def info(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id or folder, of a base model or of a sleep checkpoint.")
    ],
    *,
    dtype: Annotated[
        Any,
        typer.Option(parser=_read_dtype, metavar="<str>", help="Of activations. By default the model's, or bfloat16."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes and FLOPs.")] = False,
    **settings: Any,
) -> None:
    """Show what MODEL would be with sleep: layers, parameters, memory and cost.

    Reads its config.json alone, so a model of any size takes seconds. A setting that is left out is the library's
    default, or what a sleep checkpoint was saved with. The blocks of a sleep checkpoint cannot be changed.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    from . import bases  # noqa: F401 - registers them with AutoConfig, as hf_sleep/__init__.py does elsewhere
    from .info import describe

    asked = {name: value for name, value in settings.items() if value is not None}
    logging.set_verbosity_error()
    with _errors_in_a_line():
        _check_folder(model)
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        found = describe(config, asked, dtype)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    console = Console(highlight=False)
    for part in _view(found, console.width):
        console.print(part)


@app.command()
def suggest_loop(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id or folder, of a base model or of a sleep checkpoint.")
    ],
    *,
    text: Annotated[Path | None, typer.Option(help="File whose beginning is read. By default our own text.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot there, such as loop.png. Needs matplotlib.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure which layers of MODEL can run again, and suggest loop and blocks.

    Loads the model and reads a few hundred tokens, once and then once for each range that is tried. Nothing is trained.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from .auto import AutoModelForSleepLM
    from .dtypes import dtype_to_load
    from .lm_config import SleepLMConfig
    from .suggest import suggest_loop as measure

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with _errors_in_a_line():
        _check_folder(model)
        read = None if text is None else text.read_text(encoding="utf-8")
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        auto: Any = AutoModelForSleepLM if isinstance(config, SleepLMConfig) else AutoModelForCausalLM
        loaded = auto.from_pretrained(model, revision=revision, dtype=dtype_to_load(config, None) or "auto")
        found = measure(loaded, AutoTokenizer.from_pretrained(model, revision=revision), read)
        if plot is not None:
            found.plot(plot)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    console = Console(highlight=False)
    for part in _view_suggestion(found):
        console.print(part)


app.command()(with_settings(serve))


@contextmanager
def _errors_in_a_line() -> Iterator[None]:
    """Print what a person can act on as one line, and exit with 1."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo("Error: " + " ".join(str(error).split()), err=True)
        raise typer.Exit(1) from None


def _check_folder(model: str) -> None:
    if (model.startswith((".", "/", "~")) or model.count("/") > 1) and not Path(model).exists():
        raise ValueError(f"there is no folder {model}")


def _view_suggestion(found: "LoopSuggestion") -> Iterator[RenderableType]:
    """Render what `hf-sleep suggest-loop` shows, part by part."""
    from .suggest import remark

    yield Text(found.name, "bold")
    yield f"{found.tokens} tokens; next-token loss of one pass {found.loss:.2f} nats"
    yield ""
    layers = Table(box=None, pad_edge=False, title="Layers, left by the median token", title_justify="left")
    for name in ("layer", "angle", "norm", "first token", "sink", "kind"):
        layers.add_column(name, justify="left" if name in ("sink", "kind") else "right")
    for row in found.layers:
        numbers = (str(row.index), f"{row.angle:.3f}", f"{row.norm:,.1f}", f"{row.first_norm:,.1f}")
        layers.add_row(*numbers, row.sink, row.kind.replace("_", " "))
    yield layers
    yield ""
    ranges = Table(box=None, pad_edge=False, title="Ranges run twice, in nats over one pass", title_justify="left")
    for name in ("loop", "loss", ""):
        ranges.add_column(name, justify="left" if not name else "right")
    for candidate in found.candidates:
        first, end = candidate.loop_layers
        ranges.add_row(f"{first}:{end}", f"{candidate.loss:+.2f}", remark(candidate))
    yield ranges
    yield ""
    settings = [f"{name}={getattr(found.config, name)}" for name in ("loop_layers", "block_layers")]
    yield f"SleepConfig({', '.join(settings)})"


def _view(found: "SleepInfo", width: int) -> Iterator[RenderableType]:
    """Render what `hf-sleep info` shows, part by part, in lines of `width` characters."""
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
    more = found.passes - 1
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
    passes = _number(found.passes, "pass", "passes")
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
        table.add_row(name, _short(count, unit), note)
    return table


def _parameters(count: int) -> str:
    return _short(count, " parameters", "kMBT")


def _short(count: float, unit: str, prefixes: str = "kMGTPE") -> str:
    """Write a number with three digits and a decimal prefix: `11.8 MB`."""
    power = 0
    while count >= 999.5:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {(['', *prefixes][power] + unit).strip()}"
