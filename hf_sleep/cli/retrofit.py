"""`hf-sleep retrofit`: a base becomes a sleep checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app, errors_in_a_line
from .loading import check_folder, load_tokenizer, quiet
from .options import Json, Revision, read_dtype, with_settings
from .show import as_json, number, short

if TYPE_CHECKING:
    from ..info import SleepInfo


@app.command()
@with_settings
def retrofit(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Hub id or folder of a base model.")],
    *,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the sleep checkpoint is written.")],
    only_sleep: Annotated[
        bool, typer.Option("--only-sleep", help="Write the new weights alone. BASE is loaded again with them.")
    ] = False,
    dtype: Annotated[Any, typer.Option(parser=read_dtype, metavar="<str>", help="By default the base's.")] = None,
    revision: Revision = None,
    tokenizer: Annotated[str | None, typer.Option(help="Hub id or folder. By default BASE's own.")] = None,
    json: Json = False,
    **settings: Any,
) -> None:
    """Give BASE fast weights to sleep with, and save it as a sleep checkpoint with its tokenizer.

    The new weights add nothing until they are trained. A recipe or a Trainer takes FOLDER as its model.
    """
    from transformers import AutoConfig

    from .. import bases  # noqa: F401 - registers them with AutoConfig, as hf_sleep/__init__.py does elsewhere
    from ..auto import AutoModelForSleepLM
    from ..info import describe
    from ..lm_config import SleepLMConfig

    with errors_in_a_line():
        quiet()
        check_folder(base)
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"--output {output}: it is there already. Name a new or empty folder")
        if isinstance(AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False), SleepLMConfig):
            raise ValueError(f"{base} is a sleep checkpoint already: give the base that it was made of")
        words = load_tokenizer(base, tokenizer, revision)
        asked = {name: value for name, value in settings.items() if value is not None}
        # A folder is found again from anywhere.
        source = str(Path(base).resolve()) if only_sleep and Path(base).exists() else base
        model = AutoModelForSleepLM.from_pretrained(source, sleep=asked, revision=revision, dtype=dtype or "auto")
        found = describe(model.config)
        model.save_pretrained(output, only_sleep=only_sleep)
        words.save_pretrained(output)
    size = sum(file.stat().st_size for file in output.iterdir())
    if json:
        as_json({"output": str(output), "bytes": size} | found.to_dict())
        return
    typer.echo(f"{base}: {_added(found)} Saved in {output}, {short(size, 'B')}.")


def _added(found: "SleepInfo") -> str:
    """Say in a line what a retrofit added."""
    sleep = found.sleep
    if not sleep.block_layers:
        return "nothing was added: its linear-attention layers are its fast weights."
    places = f"layer{'s' * (len(sleep.block_layers) > 1)} {', '.join(map(str, sleep.block_layers))}"
    blocks = number(len(sleep.block_layers), f"{sleep.block_kind} block")
    share = f"{short(found.added_parameters, ' parameters', 'kMBT')}, {found.added_percent:.2g} %"
    return f"{blocks} added after {places} ({share}), untrained: so far they add nothing."
