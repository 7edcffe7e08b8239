"""Options that several commands share, each in one place."""

from collections.abc import Callable, Iterable
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checks import LEAST_TEMPERATURE
from ..config import SETTINGS

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id or folder, of a base model or of a sleep checkpoint.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Tokenizer = Annotated[str | None, typer.Option(help="Hub id or folder. By default MODEL's own.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="A system prompt, of a new memory.")]
Template = Annotated[bool, typer.Option("--chat/--no-chat", help="With the chat template, if any.")]
Memory = Annotated[Path, typer.Option(metavar="FILE", help="A memory that `hf-sleep read` or a session saved.")]


def row_of(kind: type[int] | type[float], separator: str) -> Callable[[str], tuple[float, ...]]:
    """A reader of numbers with a separator between them."""

    def read(value: str) -> tuple[float, ...]:
        try:
            return tuple(kind(part) for part in value.split(separator))
        except ValueError:
            numbers = "integers" if kind is int else "numbers"
            raise typer.BadParameter(f"{value!r} is not a row of {numbers} with {separator!r} between them") from None

    return read


# How the settings are read that are no single number or word.
ROWS: dict[str, dict[str, Any]] = {
    "loop_layers": {"metavar": "A:B", "parser": row_of(int, ":")},
    "block_layers": {"metavar": "A,B,...", "parser": row_of(int, ",")},
    "block_half_lives": {"metavar": "A:B", "parser": row_of(float, ":")},
}


def read_dtype(name: str) -> Any:
    """A floating dtype of torch by its name."""
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise typer.BadParameter(f"{name!r} is not a floating dtype of torch of 16 bits or more, such as bfloat16")
    return dtype


Dtype = Annotated[
    Any,
    typer.Option(
        parser=read_dtype,
        metavar="<str>",
        help="By default the checkpoint's, or float32 where the CPU would emulate it.",
    ),
]


def _with_options(command: Callable[..., None], options: list[Parameter]) -> Callable[..., None]:
    """Give a command further options, after its own; it takes them as its `**keywords`."""
    own = signature(command)
    first = [p for p in own.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    command.__signature__ = own.replace(parameters=[*first, *options])  # type: ignore[attr-defined]
    return command


def _option(name: str, annotation: Any, default: Any = None) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def with_settings(command: Callable[..., None], shown: Iterable[str] = SETTINGS) -> Callable[..., None]:
    """Give a command an option for each setting of `SleepConfig`.

    Args:
        command: takes them as `**settings`, `None`: not given.
        shown: those that its help lists.
    """
    options = []
    for name, field in SETTINGS.items():
        numbers = [kind for kind in (int, float) if type(field.default) is kind or field.type == kind | None]
        kind: Any = numbers[0] if numbers else bool if field.type is bool else str
        usual = ":".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text, _, _ = field.metadata["help"].partition(" None: ")  # which no command line can say
        text += "" if usual is None else f" [default, of a base: {usual}]"
        option = typer.Option(help=text, show_default=False, hidden=name not in shown, **ROWS.get(name, {}))
        options.append(_option(name, Annotated[kind | None, option]))
    return _with_options(command, options)


LOADING = [
    _option("dtype", Dtype),
    _option("device", Annotated[str | None, typer.Option(help="cpu, cuda, … By default the GPU where there is one.")]),
    _option("revision", Revision),
    _option("tokenizer", Tokenizer),
]


ANSWERING = [
    _option("max_new_tokens", Annotated[int, typer.Option(min=1, metavar="N", help="Of an answer, at most.")], 128),
    _option(
        "temperature",
        Annotated[
            float | None,
            typer.Option(min=0, metavar="T", help="0: the likeliest token. By default the model's own setting."),
        ],
    ),
    _option("seed", Annotated[int | None, typer.Option(help="Of what is drawn.")]),
    _option("chat", Template, True),
]
OFTEN = ("window_size", "sleep_passes", "eviction", "num_sink_tokens")
"""Settings that a command shows which runs a model; the others work too, and `hf-sleep retrofit --help` lists them."""


def with_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options by which a model is loaded, and the settings; it takes them as `**how`."""
    command.__doc__ = f"{command.__doc__}\n    Of a base, every setting of `hf-sleep retrofit` may be given too.\n"
    return with_settings(_with_options(command, LOADING), OFTEN)


def with_answers(command: Callable[..., None]) -> Callable[..., None]:
    """The same as `with_model`, with how the model answers."""
    return with_model(_with_options(command, ANSWERING))


def session_settings(chat: bool, system: str | None = None) -> dict[str, Any]:
    """Keywords for a `SleepSession`, of what `--chat` and `--system` gave."""
    return {"system": system, "chat": None if chat else False}


def generation(how: dict[str, Any]) -> dict[str, Any]:
    """Keywords for `generate`, of what `with_answers` gave; what is drawn is drawn from its seed."""
    import torch

    if how["seed"] is not None:
        torch.manual_seed(how["seed"])
    asked: dict[str, Any] = {"max_new_tokens": how["max_new_tokens"]}
    if how["temperature"] is not None:
        asked["do_sample"] = how["temperature"] >= LEAST_TEMPERATURE
        if asked["do_sample"]:
            asked["temperature"] = how["temperature"]
    return asked
