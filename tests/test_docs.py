"""What the pages show can be pasted: blocks compile, import what exists, and read files on Windows as elsewhere."""

import ast
import re
import runpy
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def test_there_are_blocks():
    assert blocks(ROOT / "README.md")
    assert len(blocks(ROOT / "docs" / "quickstart.md")) > 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_compile_and_import_what_there_is(page):
    for block in blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    assert hasattr(import_module(node.module), alias.name), f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Call):
                function = ast.unparse(node.func)
                if function == "open" or function.endswith(("read_text", "write_text")):
                    assert "encoding" in {keyword.arg for keyword in node.keywords}, ast.unparse(node)


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_the_first_blocks_leave_the_dtype_to_the_machine(name):
    assert "dtype" not in blocks(ROOT / name)[0]


def test_the_table_of_settings_is_that_of_the_fields():
    """`python scripts/settings_table.py` writes it again."""
    with_table = runpy.run_path(str(ROOT / "scripts" / "settings_table.py"))["with_table"]
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    assert with_table(page) == page
    with pytest.raises(ValueError, match="0 tables"):
        with_table("# A page without one\n")
