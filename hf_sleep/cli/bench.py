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
from .show import as_json, console, number, short, table

if TYPE_CHECKING:
    import torch

TOKENS = 2048
WARM_UP = 16
"""Tokens that are read before the clock runs."""


@dataclass(frozen=True)
class Measured:
    """What one model took.

    Args:
        read_tokens_per_second: sleeps included.
        seconds_per_sleep: mean; `None` of the base.
        decode_ms_per_token: median, after all was read.
        bytes_held: by the cache, after all was read. Of a model that sleeps it is most where a window is full.
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
    tokens: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="To read. By default 2,048, or what the base has room for.")
    ] = None,
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
        read = ids.shape[1]
        with_sleep, base = measure(loaded, ids, decode)
    sleep = loaded.config.sleep
    facts: dict[str, Any] = {"model": model, "tokens": read, "decoded": decode} | _machine(loaded)
    facts |= {"window_size": sleep.window_size, "sleep_passes": sleep.to_dict()["sleep_passes"]}
    if json:
        as_json(facts | {"sleep": asdict(with_sleep), "base": asdict(base), "ratio": _ratios(with_sleep, base)})
        return
    shown = console()
    shown.print(f"{model}: {facts['dtype']} on {facts['device']}, {number(facts['threads'], 'thread')}")
    shown.print(f"{read:,} tokens read, {decode:,} decoded; L = {sleep.window_size:,}, N = {facts['sleep_passes']}")
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
    ("bytes_held", "held after reading", lambda count: short(count, "B")),
)


def _ratios(with_sleep: Measured, base: Measured) -> dict[str, float]:
    pairs = {name: (getattr(with_sleep, name), getattr(base, name)) for name, *_ in _ROWS}
    return {name: one / other for name, (one, other) in pairs.items() if other}


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


class _WithSleep:
    """A model that sleeps, with what it has read."""

    def __init__(self, model: Any):
        from ..cache import SleepCache

        self.model, self.cache = model, SleepCache()

    def __call__(self, ids: "torch.Tensor") -> "torch.Tensor":
        return self.model(ids, cache=self.cache, logits_to_keep=1).logits

    def num_bytes(self) -> int:
        return self.cache.num_bytes()


class _Base:
    """A base, with a cache of its own."""

    def __init__(self, lm: Any):
        self.lm, self.cache = lm, None

    def __call__(self, ids: "torch.Tensor") -> "torch.Tensor":
        from ..compat import CACHE

        output = self.lm(ids, use_cache=True, logits_to_keep=1, **{CACHE: self.cache})
        self.cache = output[CACHE]
        return output.logits

    def num_bytes(self) -> int:
        """Bytes of all its tensors: keys and values, and states of linear layers."""
        import torch

        layers: Any = getattr(self.cache, "layers", ())
        tensors = [value for layer in layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


def measure(model: Any, ids: "torch.Tensor", decode: int) -> tuple[Measured, Measured]:
    """Measure a model that sleeps, and its base: each reads, then they decode in turns.

    Args:
        model: a `SleepForCausalLM`.
        ids: `[1, T]`.
        decode: tokens to decode after them.
    """
    import torch

    def timed(run: Callable[[Any], Any], new: "torch.Tensor") -> tuple["torch.Tensor", float]:
        began = _now(ids)
        logits = run(new)
        return logits[:, -1:].argmax(-1), _now(ids) - began

    slept: list[float] = []
    with torch.inference_mode(), model.on_sleep(lambda event: slept.append(event.seconds)):
        runs: list[Any] = [_WithSleep(model), _Base(model.lm)]
        for run in runs:  # what is done once a process
            timed(run, timed(run, ids[:, :WARM_UP])[0])
        slept.clear()
        runs = [_WithSleep(model), _Base(model.lm)]
        read = [timed(run, ids) for run in runs]
        sleeps, held = list(slept), [run.num_bytes() for run in runs]
        steps: list[list[float]] = [[], []]
        last = [token for token, _ in read]
        for _ in range(decode):
            for i, run in enumerate(runs):
                last[i], seconds = timed(run, last[i])
                steps[i].append(seconds)
    each = [sum(sleeps) / len(sleeps) if sleeps else None, None]
    with_sleep, base = (
        Measured(ids.shape[1] / read[i][1], each[i], 1000 * statistics.median(steps[i]), held[i]) for i in (0, 1)
    )
    return with_sleep, base


def _now(ids: "torch.Tensor") -> float:
    """Seconds, when the device of `ids` has done all it was given."""
    import torch

    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
    return time.perf_counter()
