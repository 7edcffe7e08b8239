"""Write the table of settings in docs/quickstart.md from the fields of SleepConfig; a test holds the two equal.

Usage: python scripts/settings_table.py [page]
"""

import re
import sys
from pathlib import Path

from hf_sleep.config import SETTINGS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "quickstart.md"
TABLE = re.compile(r"^\| field \| default \| meaning \|\n(\|.*\n)*", re.MULTILINE)


def table() -> str:
    """The settings as Markdown, a line each."""
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for name, field in SETTINGS.items():
        default = f'"{field.default}"' if isinstance(field.default, str) else field.default
        lines.append(f"| `{name}` | `{default}` | {field.metadata['help']} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """A page's text with the table as it has to be.

    Raises:
        ValueError: a page that has no such table, or several.
    """
    text, count = TABLE.subn(lambda _: table(), text)
    if count != 1:
        raise ValueError(f"the page has {count} tables of settings: it must have one, which begins {table()[:30]!r}")
    return text


if __name__ == "__main__":
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
