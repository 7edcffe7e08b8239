"""The command itself, and how its errors reach a person."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from ..version import __version__
from .show import printable

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """Print what a person can act on as one line, and exit with 1; with 130 after Ctrl-C. Warnings are a line each."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: say(f"Warning: {one_line(message)}")
            yield
    except (ValueError, OSError, ImportError) as error:
        complain(error)
        raise typer.Exit(1) from None
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        complain(f"out of memory ({one_line(error)}): try --dtype bfloat16, a smaller --window-size, or --device cpu")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        say("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None


def complain(error: object) -> None:
    """Print an error as one line."""
    say(f"Error: {one_line(error)}")


def say(line: str) -> None:
    """Print a line beside the results: to stderr."""
    typer.echo(line, err=True)


def one_line(error: object) -> str:
    """What an error says, in one line."""
    return printable(" ".join(str(error).split()))
