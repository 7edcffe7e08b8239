"""The recipes' arguments: dataclasses whose fields carry their own help, for transformers' HfArgumentParser."""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from transformers import HfArgumentParser

Options = TypeVar("Options")


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of a recipe's own docstring, and says every default."""


class JSONObject(dict):
    """A dictionary that is written as JSON on the command line."""

    def __init__(self, text: str = "{}"):
        super().__init__(json.loads(text))


def argument(default: Any, text: str, **more: Any) -> Any:
    """A field with its default and its help; `more` goes to argparse: choices, metavar."""
    default = {"default_factory": default.copy} if isinstance(default, list | dict) else {"default": default}
    return field(**default, metadata={"help": text, **more})


@dataclass
class InParts:
    """Arguments of recipes that may be interrupted."""

    minutes: float | None = argument(None, "save and stop when the process is so old; None: never")
    resume: bool = argument(False, "continue what --output holds, if anything")


def parse(
    kind: type[Options],
    description: str | None,
    arguments: list[str] | None = None,
    presets: Mapping[str | None, Mapping[str, Any]] | None = None,
    positional: Mapping[str, Mapping[str, Any]] | None = None,
) -> Options:
    """Read the command line.

    Args:
        kind: the dataclass of a recipe's arguments.
        description: the recipe's docstring.
        arguments: instead of the process's own.
        presets: by the value of `--preset`, what stands where no argument is given; by `None` where a recipe has none.
        positional: by name, and in their order, what argparse is to know of arguments without dashes; they are fields
            of `kind` with `init=False`.

    Raises:
        SystemExit: arguments that cannot work.
    """
    parser = HfArgumentParser(kind, description=description, formatter_class=Formatter)
    for name, settings in (positional or {}).items():
        parser.add_argument(name, **settings)
    for each in dataclasses.fields(kind):
        if each.type in (bool, bool | None) and not each.default:
            # A preset, or a checkpoint, may have switched it on.
            parser._option_string_actions[f"--{each.name.replace('_', '-')}"].nargs = "?"
            parser._option_string_actions[f"--{each.name.replace('_', '-')}"].const = True
            off = f"--no-{each.name.replace('_', '-')}"
            parser.add_argument(
                off, dest=each.name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )
    if presets:
        chosen = getattr(parser.parse_known_args(arguments)[0], "preset", None)
        parser.set_defaults(**presets.get(chosen, {}))
    try:
        options, *extra = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except ValueError as error:
        parser.error(str(error))
    for name in positional or {}:
        setattr(options, name, getattr(extra[0], name))
    return options


def require_pair(name: str, value: list[Any] | None) -> None:
    """Raise a `ValueError` unless `value` has two items or is `None`."""
    if value is not None and len(value) != 2:
        given = " ".join(map(str, value))
        raise ValueError(f"--{name} {given}: it takes two numbers, the lower one first")
