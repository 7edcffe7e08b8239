"""`hf-sleep chat`: a conversation with a memory."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import INTERRUPTED, app, complain, errors_in_a_line, one_line, say
from .generate import answered
from .loading import load_session, load_state, reopened
from .memory import read_with_bar, text_in
from .options import Model, System, generation, session_settings, with_answers
from .show import as_line, number, print_report, short, status

if TYPE_CHECKING:
    from ..session import SleepSession

PROMPT = "> "
TROUBLE = (ValueError, OSError)
"""What a person can act on, and the chat continues after."""


@app.command()
@with_answers
def chat(
    model: Model,
    *,
    memory: Annotated[Path | None, typer.Option(metavar="FILE", help="A memory to begin with.")] = None,
    system: System = None,
    json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each line that is read.")] = False,
    **how: Any,
) -> None:
    """Talk with a model that sleeps. /help lists what else can be typed.

    Ctrl-C ends an answer or a command, Ctrl-D the chat. From a pipe, each line is a message; the exit code is 1 where
    one failed.
    """
    with errors_in_a_line():
        settings = session_settings(how["chat"], system)
        talk = Chat(load_session(model, memory, how, **settings), generation(how), settings, json, memory)
        failed = talk.run_at_a_terminal() if sys.stdin.isatty() else talk.run(sys.stdin)
    if failed:
        raise typer.Exit(1)


class Over(Exception):
    """The end of a chat."""


@dataclass
class Chat:
    """A session, and what a person types.

    Args:
        session: that is talked with.
        generation: keywords for `generate`.
        settings: of the session, for one that is loaded later.
        json: print JSON lines.
        path: the memory's file.
        is_typed: by a person, at a terminal.
    """

    session: "SleepSession"
    generation: dict[str, Any]
    settings: dict[str, Any]
    json: bool = False
    path: Path | None = None
    is_typed: bool = field(default=False, init=False)

    def run_at_a_terminal(self) -> int:
        """Talk until Ctrl-D. Returns 0."""
        with suppress(ImportError):  # Windows has its own editing
            import readline  # noqa: F401 - gives `input` its editing and its history
        self.is_typed = True
        say(f"{self._status()} /help lists the commands, Ctrl-D ends the chat.")
        while True:
            try:
                line = input(PROMPT)
            except EOFError:
                say("")
                return 0
            except KeyboardInterrupt:
                say("\n(Ctrl-D ends the chat.)")
                continue
            try:
                self.take(line)
            except Over:
                return 0
            except KeyboardInterrupt:
                if self.json:
                    as_line(_record(line) | {"interrupted": True})
                say("Interrupted.")

    def run(self, lines: Iterator[str]) -> int:
        """Take lines from a pipe. Returns how many of them failed."""
        failed = 0
        for line in lines:
            try:
                failed += not self.take(line.rstrip("\r\n"))
            except Over:
                break
        return failed

    def take(self, line: str) -> bool:
        """Do what a line says; whether that worked.

        Raises:
            Over: it was `/exit`.
        """
        if not line.strip():
            return True
        record = _record(line)
        try:
            record |= (self._obey if "command" in record else self._answer)(line)
        except TROUBLE as error:
            if self.json:
                as_line(record | {"error": one_line(error)})
            else:
                complain(error)
            return False
        if self.json:
            as_line(record | {"report": asdict(self.session.report())})
        if record.get("interrupted") and not self.is_typed:
            raise typer.Exit(INTERRUPTED)
        return True

    def _answer(self, line: str) -> dict[str, Any]:
        message = line[1:] if line.startswith("//") else line
        pieces = self.session.stream(message, remember=True, **self.generation)
        answer, is_whole = answered(pieces, shows=not self.json, waits=self.is_typed)
        if not self.json:
            say(typer.style(self._status(), dim=True))
        return {"answer": answer, "interrupted": not is_whole}

    def _obey(self, line: str) -> dict[str, Any]:
        name, _, rest = line[1:].partition(" ")
        if name not in COMMANDS:
            raise ValueError(f"there is no /{name}: /help lists the commands. A message that begins with / needs two")
        said = COMMANDS[name].run(self, rest.strip())
        if said and not self.json:
            say(said)
        return {}

    def _status(self) -> str:
        return status(self.session.report(), self.session.steps.window_size)

    # Commands: each takes what was typed after its name, and returns a line for a person.

    def read(self, name: str) -> str:
        """Read a text file."""
        ids = self.session.steps.turns.encode(text_in(self._named(name, "/read notes.txt")))
        before = self.session.report().tokens
        try:
            read_with_bar(self.session, ids, Path(name).name)
        except KeyboardInterrupt:
            done = self.session.report().tokens - before
            return f"Interrupted after {number(done, 'token')}, which are kept; /undo drops them. {self._status()}"
        return self._status()

    def sleep(self, _: str) -> str:
        """Sleep now, on what the window holds."""
        self.session.sleep()
        return self._status()

    def undo(self, _: str) -> str:
        """Take back the last turn, text or sleep."""
        self.session.undo()
        return self._status()

    def rollback(self, _: str) -> str:
        """Go back to the last sleep."""
        self.session.rollback()
        return self._status()

    def save(self, name: str) -> str:
        """Save the memory; without a name, where it came from."""
        path = self.path if not name and self.path is not None else self._named(name, "/save notes.sleep")
        if path.exists() and path != self.path:
            raise ValueError(f"{path} exists: take another name, or /load it first")
        self.session.save(path)
        self.path = path
        return f"Saved {path}, {short(path.stat().st_size, 'B')}."

    def load(self, name: str) -> str:
        """Continue another memory; the one of this chat is dropped."""
        path = self._named(name, "/load notes.sleep")
        self.session = reopened(self.session, load_state(path), str(path), **self.settings)
        self.path = path
        return self._status()

    def forget(self, _: str) -> str:
        """Forget everything; files stay."""
        self.session.forget()
        return self._status()

    def report(self, _: str) -> str:
        """Show what was read, and what it took."""
        if not self.json:
            print_report(self.session.report(), self.session.steps.window_size)
        return ""

    def help(self, _: str) -> str:
        """List the commands."""
        return "\n".join(
            f"{f'/{name} {c.argument}':16} {(c.run.__doc__ or '').strip()}" for name, c in COMMANDS.items()
        )

    def exit(self, _: str) -> str:
        """End the chat. What was not saved is gone."""
        raise Over

    def _named(self, name: str, example: str) -> Path:
        if not name:
            raise ValueError(f"a file's name is missing: {example}")
        return Path(name).expanduser()


def _record(line: str) -> dict[str, Any]:
    """The beginning of a line of JSON: what was typed, and whether it is a command."""
    is_command = line.startswith("/") and not line.startswith("//")
    return {"command" if is_command else "message": line}


@dataclass(frozen=True)
class Command:
    """A command of the chat: what runs it, and what it takes."""

    run: Callable[[Chat, str], str]
    argument: str = ""


COMMANDS = {
    "read": Command(Chat.read, "FILE"),
    "sleep": Command(Chat.sleep),
    "undo": Command(Chat.undo),
    "rollback": Command(Chat.rollback),
    "save": Command(Chat.save, "[FILE]"),
    "load": Command(Chat.load, "FILE"),
    "forget": Command(Chat.forget),
    "report": Command(Chat.report),
    "help": Command(Chat.help),
    "exit": Command(Chat.exit),
}
