"""`hf-sleep read` and `hf-sleep ask`: a memory that is made of files, and asked."""

import hashlib
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from .app import INTERRUPTED, app, errors_in_a_line, say
from .generate import answered
from .loading import load_session, open_store
from .options import Json, Memory, Model, System, Template, generation, session_settings, with_answers, with_model
from .show import as_json, console, number, printable, short, status

if TYPE_CHECKING:
    from ..held import Source
    from ..session import SleepSession


@app.command()
@with_model
def read(
    model: Model,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Text files; - reads stdin.", allow_dash=True)],
    *,
    memory: Annotated[Path, typer.Option(metavar="FILE", help="Where the memory is saved.")],
    memory_in: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A memory to begin with; may be the same file.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Instead of the file's name, of one file.")] = None,
    system: System = None,
    chat: Template = True,
    store: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A folder, or a URL of fsspec's: windows that lie there are not read again."),
    ] = None,
    then_sleep: Annotated[bool, typer.Option("--then-sleep", help="Sleep after the last file.")] = False,
    json: Json = False,
    **how: Any,
) -> None:
    """Read files into a memory, and save it.

    Ctrl-C ends the reading and saves the windows that were read. To continue there, give the same command with
    --memory-in: a beginning that the memory has is not read again.
    """
    with errors_in_a_line():
        _check_output(memory, memory_in)
        if title is not None and len(files) > 1:
            raise ValueError(f"--title names one file, and {len(files)} are given: leave it out, or read them in turn")
        texts = [(title or _title(file), text_in(file)) for file in files]
        settings = session_settings(chat, system) | ({} if store is None else {"store": open_store(store)})
        session = load_session(model, memory_in, how, **settings)
        is_whole = _read_all(session, texts, then_sleep)
        with _uninterrupted():
            if is_whole or session.report().sources:
                session.save(memory)
    _tell(session, memory, is_whole, json)
    if not is_whole:
        raise typer.Exit(INTERRUPTED)


def _tell(session: "SleepSession", memory: Path, is_whole: bool, json: bool) -> None:
    """Say what was read, and where it is."""
    report = session.report()
    if json:
        as_json({"memory": str(memory), "interrupted": not is_whole, "report": asdict(report)})
        return
    size = f", {short(memory.stat().st_size, 'B')}" if report.sources else ""
    if is_whole:
        typer.echo(f"Saved {memory}{size} {status(report, session.steps.window_size)}")
    elif report.sources:
        say(f"Interrupted. What was read until then is in {memory}{size}: {number(report.tokens, 'token')}.")
    else:
        say("Interrupted before anything was read: nothing is saved.")


def _check_output(memory: Path, memory_in: Path | None) -> None:
    """Refuse to write over a memory, before hours of reading."""
    if memory.exists() and (memory_in is None or not memory_in.exists() or not memory.samefile(memory_in)):
        raise ValueError(f"{memory} exists: to read more into it, pass --memory-in {memory} too, or name another file")
    if not memory.resolve().parent.is_dir():
        raise ValueError(f"--memory {memory}: there is no folder {memory.resolve().parent}")


def _title(file: Path) -> str:
    return "stdin" if str(file) == "-" else file.name


def text_in(file: Path) -> str:
    """The text of a file, or of stdin.

    Raises:
        ValueError: no file, no text in UTF-8, or none at all.
    """
    if str(file) != "-" and not file.is_file():
        raise ValueError(f"there is no file {file}")
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise ValueError(f"{_title(file)} holds no text")
    return text


def _read_all(session: "SleepSession", texts: Sequence[tuple[str, str]], then_sleep: bool) -> bool:
    """Read texts that have a title each, with a bar, and sleep at their end; whether nobody interrupted it."""
    encoded = [(title, session.steps.turns.encode(text)) for title, text in texts]
    try:
        for title, ids in encoded:
            done = read_before(session.report().sources, title, ids)
            if done:
                rest = "" if done == len(ids) else ", and it continues there"
                say(f"{title}: {done:,} of {number(len(ids), 'token')} were read before{rest}.")
            if done < len(ids):
                read_with_bar(session, ids[done:], title)
        if then_sleep:
            session.sleep()
    except KeyboardInterrupt:
        return False
    return True


def read_before(sources: Sequence["Source"], title: str, ids: list[int]) -> int:
    """How many of a text's first tokens a memory has read under this title, at once or bit by bit."""
    done = 0
    for source in sources:
        part = ids[done : done + source.tokens]
        if source.title == title and source.tokens == len(part) and source.sha256 == _digest(part):
            done += len(part)
    return done


def _digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(b"".join(token.to_bytes(4, "little") for token in ids)).hexdigest()


def read_with_bar(session: "SleepSession", ids: list[int], title: str) -> None:
    """Read a text's ids into a session; on a terminal, with a bar."""
    shown = console(stderr=True)
    is_narrow = shown.width < 60
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}")]
    if not is_narrow:
        columns.append(TimeRemainingColumn())
    with Progress(*columns, console=shown, disable=not shown.is_terminal, transient=True) as bar:
        task = bar.add_task(printable(title[:20]), total=len(ids), state="")

        def tell(progress: Any) -> None:
            speed = progress.tokens / progress.seconds if progress.seconds else 0.0
            state = f"{number(progress.sleeps, 'sleep')} · {short(progress.num_bytes, 'B')}"
            bar.update(
                task, completed=progress.tokens, state=state + ("" if is_narrow else f" · {speed:,.0f} tokens/s")
            )

        session.read(ids, title=title, progress=False, on_progress=tell)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let no second Ctrl-C come between a memory and its file."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@app.command()
@with_answers
def ask(
    model: Model,
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION...", help="- reads them from stdin, one a line.")],
    *,
    memory: Memory,
    json: Json = False,
    **how: Any,
) -> None:
    """Ask a memory. The file stays as it is.

    Each question is answered by itself, as if it were the only one; several are answered together.
    """
    with errors_in_a_line():
        asked = [line for line in sys.stdin.read().splitlines() if line.strip()] if questions == ["-"] else questions
        if not all(question.strip() for question in asked) or not asked:
            raise ValueError("a question says nothing: ask something")
        session = load_session(model, memory, how, **session_settings(how["chat"]))
        if len(asked) == 1:
            said, is_whole = answered(session.stream(asked[0], **generation(how)), shows=not json)
            answers = [said]
        else:
            answers, is_whole = session.ask_many(asked, **generation(how)), True
    if json:
        pairs = [{"question": q, "answer": a} for q, a in zip(asked, answers, strict=True)]
        as_json({"memory": str(memory), "interrupted": not is_whole, "answers": pairs})
    elif len(asked) > 1:
        for question, answer in zip(asked, answers, strict=True):
            typer.echo(f"{typer.style(question, bold=True)}\n{answer}\n")
    if not is_whole:
        raise typer.Exit(INTERRUPTED)
