"""`hf-sleep bench`: what sleep costs and saves on this machine, beside the base with its whole KV cache."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app, errors_in_a_line
from .loading import load_model
from .options import Json, Model, with_model
from .show import as_json, console, short, table

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Measured:
    """What one model took.

    Args:
        read_tokens_per_second: sleeps included.
        seconds_per_sleep: mean; `None` of the base.
        decode_ms_per_token: median, after all was read.
        bytes_held: by the cache, after all was read and decoded.
    """

    read_tokens_per_second: float
    seconds_per_sleep: float | None
    decode_ms_per_token: float
    bytes_held: int


@app.command()
@with_model
def bench(
    model: Model,
    *,
    tokens: Annotated[int, typer.Option(min=2, metavar="N", help="To read.")] = 2048,
    decode: Annotated[int, typer.Option(min=1, metavar="N", help="To decode after them.")] = 32,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What is read, again where it is short. By default our own text."),
    ] = None,
    json: Json = False,
    **how: Any,
) -> None:
    """Measure MODEL, and its base with a whole KV cache, on the same text.

    Numbers of one run on a machine that does other things too: look at the ratios, and run it twice.
    """
    with errors_in_a_line():
        loaded, tokenizer = load_model(model, how)
        ids = _token_ids(loaded, tokenizer, text, tokens, decode)
        with_sleep, base = measured(loaded, ids, decode), measured_base(loaded.lm, ids, decode)
    sleep, facts = loaded.config.sleep, {"model": model, "tokens": tokens, "decoded": decode} | _machine(loaded)
    facts |= {"window_size": sleep.window_size, "sleep_passes": sleep.to_dict()["sleep_passes"]}
    if json:
        as_json(facts | {"sleep": asdict(with_sleep), "base": asdict(base), "ratio": _ratios(with_sleep, base)})
        return
    shown = console()
    shown.print(f"{model}: {facts['dtype']} on {facts['device']}, {facts['threads']} threads")
    shown.print(f"{tokens:,} tokens read, {decode:,} decoded; L = {sleep.window_size:,}, N = {facts['sleep_passes']}")
    shown.print("")
    shown.print(_view(with_sleep, base))


def _view(with_sleep: Measured, base: Measured) -> Any:
    rows, ratios = table("", ">sleep", ">base", ">sleep/base"), _ratios(with_sleep, base)
    for name, label, write in _ROWS:
        cells = [getattr(of, name) for of in (with_sleep, base)]
        rows.add_row(
            label,
            *("-" if cell is None else write(cell) for cell in cells),
            f"{ratios[name]:.2f}" if name in ratios else "",
        )
    return rows


_ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("read_tokens_per_second", "read, tokens/s", "{:,.0f}".format),
    ("seconds_per_sleep", "a sleep, s", "{:.3f}".format),
    ("decode_ms_per_token", "decode, ms/token", "{:.1f}".format),
    ("bytes_held", "held", lambda count: short(count, "B")),
)


def _ratios(with_sleep: Measured, base: Measured) -> dict[str, float]:
    pairs = {name: (getattr(with_sleep, name), getattr(base, name)) for name, *_ in _ROWS}
    return {name: one / other for name, (one, other) in pairs.items() if other}


def _machine(model: Any) -> dict[str, Any]:
    import torch

    dtype = str(model.dtype).removeprefix("torch.")
    return {"dtype": dtype, "device": str(model.device), "threads": torch.get_num_threads()}


def _token_ids(model: Any, tokenizer: Any, file: Path | None, tokens: int, decode: int) -> "torch.Tensor":
    """The first `tokens` ids of a text, `[1, T]`, again from its beginning where it is short.

    Raises:
        ValueError: more tokens than the base has positions for, or an empty text.
    """
    import torch

    from ..suggest import TEXT

    most = getattr(model.lm.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and tokens + decode > most:
        raise ValueError(f"--tokens {tokens}: the base has {most:,} positions, so use at most {most - decode}")
    ids = tokenizer(TEXT if file is None else file.read_text(encoding="utf-8")).input_ids
    if not ids:
        raise ValueError(f"--text {file}: it holds no text")
    return torch.tensor([(ids * -(-tokens // len(ids)))[:tokens]], device=model.device)


def measured(model: Any, ids: "torch.Tensor", decode: int) -> Measured:
    """Measure a model that sleeps.

    Args:
        model: a `SleepForCausalLM`.
        ids: `[1, T]`.
        decode: tokens to decode after them.
    """
    from ..cache import SleepCache

    seconds: list[float] = []
    cache = SleepCache()
    with model.on_sleep(lambda event: seconds.append(event.seconds)):
        read, step = _times(lambda new: model(new, cache=cache, logits_to_keep=1).logits, ids, decode)
    mean = sum(seconds) / len(seconds) if seconds else None
    return Measured(ids.shape[1] / read, mean, 1000 * step, cache.num_bytes())


def measured_base(lm: Any, ids: "torch.Tensor", decode: int) -> Measured:
    """The same of a base with a cache of its own."""
    from ..compat import CACHE

    held: dict[str, Any] = {CACHE: None}

    def run(new: Any) -> Any:
        output = lm(new, use_cache=True, logits_to_keep=1, **held)
        held[CACHE] = output[CACHE]
        return output.logits

    read, step = _times(run, ids, decode)
    return Measured(ids.shape[1] / read, None, 1000 * step, _bytes_of(held[CACHE]))


def _times(run: Callable[[Any], Any], ids: "torch.Tensor", decode: int) -> tuple[float, float]:
    """Seconds of reading, and the median of decoding a token."""
    import torch

    def now() -> float:
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
        return time.perf_counter()

    with torch.inference_mode():
        began = now()
        logits = run(ids)
        read, steps = now() - began, []
        for _ in range(decode):
            began = now()
            logits = run(logits[:, -1:].argmax(-1))
            steps.append(now() - began)
    return read, statistics.median(steps)


def _bytes_of(cache: Any) -> int:
    """Bytes of all tensors of a cache of transformers: keys and values, and states of linear layers."""
    import torch

    tensors = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
