"""Code on the pages can be pasted: blocks compile, import what exists, and read files on Windows as elsewhere."""

import ast
import re
import runpy
from importlib import import_module
from pathlib import Path

import pytest
import torch
from families import _COMMON, _EXPERTS, _SCALES
from helpers import byte_tokenizer, save_tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from hf_sleep.bases.probe import probe
from hf_sleep.registry import BASES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_RESULTS = [*PAGES, *sorted((ROOT / "docs" / "results").glob("*.md")), ROOT / "examples" / "khop" / "README.md"]
FOLDERS = [ROOT / name for name in (".", "hf_sleep", "tests", "recipes", "recipes/accelerate")]
DEMO = ".demo/SmolLM2-135M-Instruct"
MADE_ELSEWHERE = {".demo/", "modeling_hf_sleep.py"}
"""Names on the pages of what `make demo` and a saved checkpoint leave."""
each_page = pytest.mark.parametrize("page", WITH_RESULTS, ids=lambda page: page.relative_to(ROOT).as_posix())


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


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own, as inductor loads
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
@pytest.mark.parametrize("page", ["quickstart.md", "memory.md"])
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    """With a tiny model where `make demo` leaves one."""
    save_tiny_llama(tmp_path / DEMO, byte_tokenizer(), torch.double, layers=4)
    (tmp_path / "README.md").write_text("It was late. " * 150, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks(ROOT / "docs" / page):
        exec(compile(block, page, "exec"), names)
    assert names["name"] == DEMO
    assert {"memory.sleep", "numbers.sleep"} & {file.name for file in (tmp_path / ".demo").iterdir()}


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_the_first_blocks_leave_the_dtype_to_the_machine(name):
    assert "dtype" not in blocks(ROOT / name)[0]


def anchors(page: Path) -> set[str]:
    """What a link can lead to: headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"\w+:", target):
            name, _, anchor = target.partition("#")
            to = page.parent / name if name else page
            assert to.exists(), target
            assert not anchor or anchor in anchors(to), target


@each_page
def test_files_and_tests_that_are_named_exist(page):
    defined = {file: file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("*.py")}
    for name in re.findall(r"`([^`\s]+)`", page.read_text(encoding="utf-8")):
        path, _, test = name.partition("::")
        path, test = ("", path) if path.startswith("test_") and "." not in path else (path, test)
        found = [folder / path for folder in (*FOLDERS, page.parent) if (folder / path).exists()]
        if re.fullmatch(r"[\w./-]+(/|\.(py|md|sh|toml|txt|yaml))", path) and path not in MADE_ELSEWHERE:
            assert found, name
        if test:
            among = [defined[found[0].resolve()]] if path else defined.values()
            assert any(f"def {test}(" in text for text in among), name


def test_the_lines_of_the_algorithm_are_those_of_the_code():
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    code = (ROOT / "hf_sleep" / "sleep.py").read_text(encoding="utf-8")
    table = page.partition("### From the paper to sleep.py")[2].partition("### ")[0]
    rows = re.findall(r"^\| [^|]+ \| `([^`]+)`[^|]* \| `(\w+)` \|$", table, re.M)
    assert len(rows) > 8
    for line, method in rows:
        body = re.search(rf"^    def {method}\(.*?(?=^    def |\Z)", code, re.S | re.M)
        assert line in body[0], f"{method}: {line}"


def test_the_page_on_extending_shows_the_examples():
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for file in (ROOT / "examples" / "extend").glob("*.py"):
        assert f"```python\n{file.read_text(encoding='utf-8')}```" in page, file.name


def test_the_adapter_on_the_page_of_models_passes_the_probe(monkeypatch):
    monkeypatch.setattr(BASES, "_classes", dict(BASES._classes))
    (block,) = (block for block in blocks(ROOT / "docs" / "models.md") if "register_base" in block)
    exec(block, {"__name__": "a_page"})
    (family,) = (name for name in BASES.names() if BASES.module_of(name) == "a_page")
    config = AutoConfig.for_model(family, **_COMMON | _EXPERTS | _SCALES)
    assert probe(AutoModelForCausalLM.from_config(config).eval()).covered


def test_the_table_of_settings_is_that_of_the_fields():
    """`python scripts/settings_table.py` writes it again."""
    with_table = runpy.run_path(str(ROOT / "scripts" / "settings_table.py"))["with_table"]
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    assert with_table(page) == page
    with pytest.raises(ValueError, match="0 tables"):
        with_table("# A page without one\n")
