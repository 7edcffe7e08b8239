"""`hf-sleep generate`: one prompt, answered as it comes."""

import sys
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict
from typing import Annotated, Any

import typer

from .app import INTERRUPTED, app, errors_in_a_line, say
from .loading import load_session
from .options import Json, Model, System, generation, session_settings, with_answers
from .show import Typed, as_json, console, status


@app.command()
@with_answers
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer; - reads it from stdin.")],
    *,
    system: System = None,
    json: Json = False,
    **how: Any,
) -> None:
    """Answer one prompt, of any length, in bounded memory.

    The answer goes to stdout as it is made, and what it took to stderr. Ctrl-C ends it.
    """
    with errors_in_a_line():
        session = load_session(model, None, how, **session_settings(how["chat"], system))
        text = sys.stdin.read() if prompt == "-" else prompt
        answer, is_whole = answered(session.stream(text, remember=True, **generation(how)), shows=not json)
        report = session.report()
    if json:
        as_json({"prompt": text, "answer": answer, "interrupted": not is_whole, "report": asdict(report)})
    else:
        say(status(report, session.steps.window_size))
    if not is_whole:
        raise typer.Exit(INTERRUPTED)


def answered(pieces: Iterator[str], shows: bool, waits: bool = False) -> tuple[str, bool]:
    """Read an answer's pieces to their end, or to Ctrl-C.

    Args:
        pieces: of an answer; a generator, which is closed.
        shows: print them as they come.
        waits: show that the first is on its way.

    Returns:
        The answer, and whether it was not interrupted.
    """
    said: list[str] = []
    write = Typed()
    is_whole = True
    try:
        with closing(pieces):  # type: ignore[type-var]
            with console(stderr=True).status("reading") if waits else nullcontext():
                piece = next(pieces, None)
            while piece is not None:
                said.append(piece)
                if shows:
                    write(piece)
                piece = next(pieces, None)
    except KeyboardInterrupt:
        is_whole = False
    finally:
        if shows:
            typer.echo()
    return "".join(said).strip(), is_whole
