"""`hf-sleep bench`: what sleep costs and saves on this machine, beside the base and StreamingLLM."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app, errors_in_a_line, one_line, say
from .loading import load_model
from .options import Json, Model, row_of, with_model
from .show import as_json, console, number, short, table

if TYPE_CHECKING:
    import torch

    from .measure import Measured, Reader

TOKENS = 2048


@app.command()
@with_model
def bench(
    model: Model,
    *,
    tokens: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="To read. By default 2,048, or what the base has room for.")
    ] = None,
    decode: Annotated[int, typer.Option(min=1, metavar="N", help="To decode after them.")] = 32,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What is read, again where it is short. By default our own text."),
    ] = None,
    passes: Annotated[
        Any,
        typer.Option(metavar="N,N,...", parser=row_of(int, ","), help="Measure these numbers of passes as well."),
    ] = None,
    json: Json = False,
    **how: Any,
) -> None:
    """Measure MODEL, its base with a whole KV cache, and StreamingLLM in as many bytes, on the same text.

    Numbers of one run on a machine that does other things too: look at the ratios, and run it twice.
    """
    with errors_in_a_line():
        from .measure import measure

        loaded, tokenizer = load_model(model, how)
        ids = _token_ids(loaded, tokenizer, text, tokens, decode)
        read = ids.shape[1]
        measured = measure(_readers(loaded, passes or ()), ids, decode)
    sleep = loaded.config.sleep
    facts: dict[str, Any] = {"model": model, "tokens": read, "decoded": decode} | _machine(loaded)
    facts |= {"window_size": sleep.window_size, "sleep_passes": sleep.to_dict()["sleep_passes"]}
    base = measured["base"]
    if json:
        own = {"sleep": asdict(measured["sleep"]), "base": asdict(base), "ratio": _ratios(measured["sleep"], base)}
        others = [name for name in measured if name not in own]
        as_json(facts | own | {"others": {name: asdict(measured[name]) for name in others}})
        return
    shown = console()
    shown.print(f"{model}: {facts['dtype']} on {facts['device']}, {number(facts['threads'], 'thread')}")
    shown.print(f"{read:,} tokens read, {decode:,} decoded; L = {sleep.window_size:,}, N = {facts['sleep_passes']}")
    for part in (_view(measured), _view_of_ratios(measured)):
        shown.print("")
        shown.print(part)


def _view(measured: "dict[str, Measured]") -> Any:
    rows = table("", *(f">{name}" for name in measured))
    for name, label, write in _ROWS:
        cells = [getattr(of, name) for of in measured.values()]
        rows.add_row(label, *("-" if cell is None else write(cell) for cell in cells))
    return rows


def _view_of_ratios(measured: "dict[str, Measured]") -> Any:
    others = {name: _ratios(of, measured["base"]) for name, of in measured.items() if name != "base"}
    rows = table("", *(f">{name}/base" for name in others))
    for name, label, _ in _ROWS:
        if all(name in ratios for ratios in others.values()):
            rows.add_row(label.partition(",")[0], *(f"{ratios[name]:.2f}" for ratios in others.values()))
    return rows


_ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("read_tokens_per_second", "read, tokens/s", "{:,.0f}".format),
    ("first_token_seconds", "first token, s", "{:.2f}".format),
    ("seconds_per_sleep", "a sleep, s", "{:.3f}".format),
    ("decode_ms_per_token", "decode, ms/token", "{:.1f}".format),
    ("bytes_held", "held after reading", lambda count: short(count, "B")),
    ("peak_bytes", "peak while reading", lambda count: short(count, "B")),
)


def _ratios(one: "Measured", base: "Measured") -> dict[str, float]:
    pairs = {name: (getattr(one, name), getattr(base, name)) for name, *_ in _ROWS}
    return {name: value / other for name, (value, other) in pairs.items() if other}


def _machine(model: Any) -> dict[str, Any]:
    import torch

    dtype = str(model.dtype).removeprefix("torch.")
    return {"dtype": dtype, "device": str(model.device), "threads": torch.get_num_threads()}


def _token_ids(model: Any, tokenizer: Any, file: Path | None, tokens: int | None, decode: int) -> "torch.Tensor":
    """The first `tokens` ids of a text, `[1, T]`, again from its beginning where it is short.

    Raises:
        ValueError: more tokens than the base has positions for, or an empty text.
    """
    import torch

    from ..suggest import TEXT

    most = getattr(model.lm.config.get_text_config(), "max_position_embeddings", None)
    if tokens is None:
        tokens = TOKENS if most is None else min(TOKENS, most - decode)
    elif most is not None and tokens + decode > most:
        raise ValueError(f"--tokens {tokens}: the base has {most:,} positions, so use at most {most - decode}")
    ids = tokenizer(TEXT if file is None else file.read_text(encoding="utf-8")).input_ids
    if not ids:
        raise ValueError(f"--text {file}: it holds no text")
    return torch.tensor([(ids * -(-tokens // len(ids)))[:tokens]], device=model.device)


def _readers(model: Any, passes: tuple[int, ...]) -> "dict[str, Callable[[], Reader]]":
    """What is measured, by name; says so where StreamingLLM cannot be.

    Raises:
        ValueError: fewer passes than one.
    """
    from ..info import describe
    from .readers import FullCache, Sleeping, StreamingLLM

    if wrong := [n for n in passes if n < 1]:
        raise ValueError(f"--passes {wrong[0]}: a window is read once at least, so use 1 or more")
    readers: dict[str, Callable[[], Reader]] = {"sleep": partial(Sleeping, model)}
    readers |= {f"N = {n}": partial(Sleeping, model, n) for n in dict.fromkeys(passes)}
    readers["base"] = partial(FullCache, model.lm)
    held = describe(model.config, dtype=model.dtype)
    try:
        streaming = partial(StreamingLLM, model.lm, held.num_bytes // max(1, held.kv_bytes_per_token))
        streaming()
    except ValueError as error:
        say(f"Without StreamingLLM: {one_line(error)}")
        return readers
    return readers | {"StreamingLLM": streaming}
