"""`hf-sleep eval`: what a model remembers, beside what there is to be had."""

import json as json_
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files import write_file
from .app import app, errors_in_a_line, one_line, say
from .loading import load_model
from .options import Json, Model, row_of, with_model
from .show import as_json, number

if TYPE_CHECKING:
    import torch

    from ..data import Task

POSITION, FORGETTING = "position", "forgetting"
OF_TEXT = (POSITION, FORGETTING)
WITHOUT_WORDS = {"mqar", "khop", "depo", "rule110"}
"""Tests on token ids, which need no tokenizer."""
HELD_OUT = 0.045
"""Share of Python's language reference, its end, that our recipes do not train on: they leave out a little more."""


@app.command("eval")
@with_model
def evaluate(
    model: Model,
    tests: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEST]...",
            help="position; forgetting; RULER's niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue, "
            "niah_multiquery, vt, cwe, fwe; facts; mqar; or a recipe's task: gsm_infinite, managers, khop, depo, "
            "rule110. By default position and niah_single_2.",
        ),
    ] = None,
    *,
    windows: Annotated[
        Any, typer.Option(metavar="A,B,...", parser=row_of(int, ","), help="Windows of text. [default: 4]")
    ] = None,
    passes: Annotated[
        Any, typer.Option(metavar="A,B,...", parser=row_of(int, ","), help="Each N. By default the model's own.")
    ] = None,
    problems: Annotated[int, typer.Option(min=1, metavar="N", help="Of each test.")] = 20,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Read for position and forgetting. By default the end of Python's language reference."
        ),
    ] = None,
    task_settings: Annotated[
        str, typer.Option(metavar="JSON", help="Fields of a recipe's task. By default those that MODEL was trained on.")
    ] = "{}",
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Rows that are read at once.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the problems.")] = 1,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write eval.json, eval.md and plots there.")
    ] = None,
    json: Json = False,
    **how: Any,
) -> None:
    """Measure what MODEL remembers of text that has left its window, at each N and with controls.

    Position is the loss over positions in a long text, and the share of what a full context gains over the window alone
    that memory gives back. Forgetting is what is left of a text, in the loss of its next window, after windows of other
    text. The other tests ask questions. Their controls are the last window alone, the full context, and the base with a
    KV cache of as many bytes as the memory takes.
    """
    from ..eval.suite import TASKS, TESTS

    with errors_in_a_line():
        chosen = tests or [POSITION, "niah_single_2"]
        if unknown := [name for name in chosen if name not in (*OF_TEXT, *TESTS, *TASKS)]:
            raise ValueError(f"{unknown[0]} is no test: there are {', '.join((*OF_TEXT, *TESTS, *TASKS))}")
        settings, windows = _settings(task_settings), windows or (4,)
        _check(chosen, windows, passes or ())
        read = _texts(text) if text else None
        loaded, tokenizer = load_model(model, how, needs_tokenizer=not set(chosen) <= WITHOUT_WORDS)
        asked = Asked(model, loaded, tokenizer, tuple(passes or _own_passes(loaded)), batch_size, problems, seed)
        report = Report(asked, output, is_shown=not json)
        for name in chosen:
            if name in OF_TEXT:
                with _left_out(name):
                    (_measure_position if name == POSITION else _measure_forgetting)(report, read, windows)
                continue
            for title, make in _tasks(asked, name, windows, settings, how["revision"]):
                with _left_out(title):
                    _run(report, name, title, make())
        if not report.results:
            raise ValueError("nothing was measured: see above")
        if json:
            as_json(report.to_dict())


@contextmanager
def _left_out(title: str) -> Iterator[None]:
    """Say what cannot be measured, and why, and continue with what can."""
    try:
        yield
    except ValueError as error:
        say(f"Left out: {title}: {one_line(error)}.")


def _check(chosen: Sequence[str], windows: Sequence[int], passes: Sequence[int]) -> None:
    for name, numbers in (("windows", windows), ("passes", passes)):
        if any(number < 1 for number in numbers):
            raise ValueError(f"--{name} {','.join(map(str, numbers))}: each must be at least 1")
    if POSITION in chosen and max(windows) < 2:
        raise ValueError("--windows 1: nothing leaves a window of position then. Give 2 or more")


@dataclass(frozen=True)
class Asked:
    """What is evaluated, and how."""

    name: str
    model: Any
    tokenizer: Any
    passes: Sequence[int]
    batch_size: int
    problems: int
    seed: int


@dataclass
class Report:
    """What was found so far; written after each test, so that nothing is lost."""

    asked: Asked
    folder: Path | None
    is_shown: bool
    results: list[dict[str, Any]] = field(default_factory=list)
    pages: list[str] = field(default_factory=list)

    def add(self, title: str, table: str, found: dict[str, Any]) -> None:
        self.results.append({"title": title} | found)
        self.pages.append(f"## {title}\n\n{table}\n")
        if self.is_shown:
            typer.echo(self.pages[-1])
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self.folder / "eval.json", json_.dumps(self.to_dict(), indent=1) + "\n")
            write_file(self.folder / "eval.md", f"# {self.asked.name}\n\n" + "\n".join(self.pages))

    def plot(self, title: str, draw: Callable[[Path], None]) -> None:
        """Draw what was added, where there is a folder and matplotlib."""
        if self.folder is None:
            return
        try:
            draw(self.folder / f"{title.replace(', ', '-').replace(' ', '-')}.png")
        except ImportError as error:
            say(f"Not drawn: {title}: {one_line(error)}. Install matplotlib for plots.")

    def to_dict(self) -> dict[str, Any]:
        from ..info import describe
        from ..version import __version__

        model = self.asked.model
        info = describe(model.config, dtype=model.dtype)
        sizes = {name: getattr(info, name) for name in ("fast_weight_bytes", "kv_bytes_per_token")}
        facts = {"model": self.asked.name, "hf_sleep": __version__, "dtype": info.dtype, "N": list(self.asked.passes)}
        return facts | sizes | {"sleep": model.config.sleep.to_dict(), "results": self.results}


def _settings(text: str) -> dict[str, Any]:
    try:
        settings = json_.loads(text)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"--task-settings {text}: it must be a JSON object, such as '{{\"hops\": [1, 2]}}'")
    if "window_size" in settings:
        raise ValueError(f"--task-settings {text}: give window_size as --window-size, which the model sleeps with")
    return settings


def _own_passes(model: Any) -> Sequence[int]:
    from ..info import most_passes

    return (most_passes(model.config.sleep),)


def _measure_position(report: Report, text: str | None, windows: Sequence[int]) -> None:
    from ..eval import loss_by_position
    from ..eval.report import plot_positions, position_table

    asked = report.asked
    ids = _text_rows(asked, text, max(windows))
    found = loss_by_position(asked.model, ids, asked.passes, asked.batch_size)
    title = f"position, {max(windows)} windows"
    table = f"{position_table(found)}\n\n{number(len(ids), 'row')} of text."
    report.add(title, table, {"test": POSITION} | found.to_dict())
    report.plot(title, lambda file: plot_positions(found, file))


def _measure_forgetting(report: Report, text: str | None, windows: Sequence[int]) -> None:
    from ..data.words import start_of
    from ..eval import forgetting
    from ..eval.report import forgetting_table, plot_forgetting

    asked = report.asked
    tokens, start = _tokens(asked, text), start_of(asked.tokenizer)
    for passes in asked.passes:
        found = forgetting(asked.model, tokens, windows, asked.problems, passes, asked.batch_size, start)
        title = f"forgetting, N {passes}"
        table = f"{forgetting_table(found)}\n\n{number(len(found.losses), 'text')}."
        report.add(title, table, {"test": FORGETTING, "N": passes} | found.to_dict())
        report.plot(title, partial(plot_forgetting, found))


def _texts(files: Sequence[Path]) -> str:
    """The texts of files, one after the other."""
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--text {file}: cannot be read as UTF-8 ({error}). Convert it, or leave it out"
            ) from error
    return "\n\n".join(texts)


def _tokens(asked: Asked, text: str | None) -> "torch.Tensor":
    """Token ids `[n]` of a text, or of our own."""
    import pydoc_data.topics

    import torch

    own = "\n\n".join(pydoc_data.topics.topics.values())
    ids = asked.tokenizer(own if text is None else text, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids[int(len(ids) * (1 - HELD_OUT)) :] if text is None else ids)


def _text_rows(asked: Asked, text: str | None, windows: int) -> "torch.Tensor":
    """Rows `[R, windows · L]` of a text, or of our own: as many as it has, and as there are problems.

    Each begins as the tokenizer lets a text begin.
    """
    import torch

    from ..data.words import start_of

    start, ids = torch.tensor(start_of(asked.tokenizer), dtype=torch.long), _tokens(asked, text)
    length = windows * asked.model.config.sleep.window_size - len(start)
    rows = min(len(ids) // length, asked.problems)
    if not rows:
        raise ValueError(f"the text has {len(ids)} tokens, and a row {length}: give more --text, or fewer --windows")
    return torch.cat((start.expand(rows, -1), ids[: rows * length].view(rows, length)), 1)


def _tasks(
    asked: Asked, name: str, windows: Sequence[int], settings: dict[str, Any], revision: str | None
) -> "Iterator[tuple[str, Callable[[], Sequence[Task]]]]":
    """Each test of that name: its title, and what makes its tasks."""
    from ..eval.suite import TASKS, TESTS, Size, make_task, trained_on, with_trained_settings

    config = asked.model.config
    sizes = [Size(asked.tokenizer, config.sleep.window_size, n, config.text_config.vocab_size) for n in windows]
    if name in TASKS:
        given, remarks = with_trained_settings(name, settings, trained_on(asked.name, revision))
        for remark in remarks:
            say(f"Note: {remark}.")
        yield name, lambda: [make_task(name, given, sizes[0])]
        return
    for size in sizes[:1] if name == "mqar" else sizes:
        title = name if name == "mqar" else f"{name}, {size.windows} windows"
        yield title, partial(TESTS[name], size)


def _run(report: Report, name: str, title: str, tasks: "Sequence[Task]") -> None:
    from ..eval.report import lines_of, plot_scores, table
    from ..eval.suite import axis, other_windows, run_test

    asked = report.asked
    for remark in {other_windows(asked.model, task) for task in tasks} - {None}:
        say(f"Note: {title}: {remark}.")
    found = run_test(asked.model, name, tasks, asked.passes, asked.problems, asked.batch_size, asked.seed)
    for control, reason in found.left_out.items():
        say(f"Left out: {title}, {control}: {reason}.")
    lines = lines_of(found.scores)
    report.add(title, table(lines, axis(name)), asdict(found))
    report.plot(title, lambda file: plot_scores(lines, axis(name), file))
