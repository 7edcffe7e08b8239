"""`hf-sleep suggest-loop`: which layers can run again."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from .app import app, errors_in_a_line
from .loading import check_folder, load_tokenizer
from .options import Json, Model, Revision, Tokenizer
from .show import as_json, console, table

if TYPE_CHECKING:
    from ..suggest import LoopSuggestion


@app.command()
def suggest_loop(
    model: Model,
    *,
    text: Annotated[Path | None, typer.Option(help="File whose beginning is read. By default our own text.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot there, such as loop.png. Needs matplotlib.")] = None,
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    json: Json = False,
) -> None:
    """Measure which layers of MODEL can run again, and suggest loop and blocks.

    Loads the model and reads a few hundred tokens, once and then once for each range that is tried. Nothing is trained.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from ..auto import AutoModelForSleepLM
    from ..dtypes import dtype_to_load
    from ..lm_config import SleepLMConfig
    from ..suggest import suggest_loop as measure

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with errors_in_a_line():
        check_folder(model)
        reader = load_tokenizer(model, tokenizer, revision)
        read = None if text is None else text.read_text(encoding="utf-8")
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        auto: Any = AutoModelForSleepLM if isinstance(config, SleepLMConfig) else AutoModelForCausalLM
        loaded = auto.from_pretrained(model, revision=revision, dtype=dtype_to_load(config, None) or "auto")
        found = measure(loaded, reader, read)
        if plot is not None:
            found.plot(plot)
    if json:
        as_json(found.to_dict())
        return
    shown = console()
    for part in _view_suggestion(found):
        shown.print(part)


def _view_suggestion(found: "LoopSuggestion") -> Iterator[RenderableType]:
    """Render what `hf-sleep suggest-loop` shows, part by part."""
    from ..suggest import remark

    yield Text(found.name, "bold")
    yield f"{found.tokens} tokens; next-token loss of one pass {found.loss:.2f} nats"
    yield ""
    columns = (">layer", ">angle", ">norm", ">first token", "sink", "kind")
    layers = table(*columns, title="Layers, left by the median token")
    for row in found.layers:
        numbers = (str(row.index), f"{row.angle:.3f}", f"{row.norm:,.1f}", f"{row.first_norm:,.1f}")
        layers.add_row(*numbers, row.sink, row.kind.replace("_", " "))
    yield layers
    yield ""
    ranges = table(">loop", ">loss", "", title="Ranges run twice, in nats over one pass")
    for candidate in found.candidates:
        first, end = candidate.loop_layers
        ranges.add_row(f"{first}:{end}", f"{candidate.loss:+.2f}", remark(candidate))
    yield ranges
    yield ""
    settings = [f"{name}={getattr(found.config, name)}" for name in ("loop_layers", "block_layers")]
    yield f"SleepConfig({', '.join(settings)})"
