"""Dependencies point one way; scripts/check_imports.py holds it, and these trees show that it can fail."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def check(root: Path) -> tuple[int, list[str]]:
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "check_imports.py"), str(root)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not run.stderr
    return run.returncode, run.stdout.splitlines()


def write(root: Path, path: str, source: str) -> None:
    file = root / "hf_sleep" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source, encoding="utf-8")


def test_this_tree_points_one_way() -> None:
    code, lines = check(ROOT)
    assert code == 0, "\n".join(lines)


@pytest.mark.parametrize(
    ("path", "source", "line", "reason"),
    [
        pytest.param(
            "ops.py", "import torch\nfrom .cache import SleepCache", 2, "ops may not import cache", id="upward"
        ),
        pytest.param(
            "layers/jet.py", "from ..sleep import wake", 1, "layers may not import sleep", id="from-subpackage"
        ),
        pytest.param("ops.py", "from . import labels, modeling", 1, "ops may not import modeling", id="from-dot"),
        pytest.param("sleep.py", "import hf_sleep.auto", 1, "sleep may not import auto", id="absolute"),
        pytest.param(
            "ops.py", "def f():\n    from .sleep import wake", 2, "ops may not import sleep", id="in-function"
        ),
        pytest.param("cache.py", "from .state import SleepState", 1, "cache may not import state", id="cache-to-state"),
        pytest.param("session.py", "from .pipeline import pipe", 1, "session may not import pipeline", id="siblings"),
        pytest.param("version.py", "from .config import SleepConfig", 1, "version may not import config", id="bottom"),
        pytest.param("bases/ouro.py", "from ..cache import SleepCache", 1, "bases may not import cache", id="bases"),
        pytest.param("layers/jet.py", "from ..bases.ouro import Ouro", 1, "layers may not import bases", id="to-bases"),
        pytest.param("data/depo.py", "from ..config import SleepConfig", 1, "data may not import config", id="data"),
        pytest.param("hub.py", "from .state import SleepState", 1, "hub may not import state", id="hub"),
        pytest.param("auto.py", "from hf_sleep import SleepConfig", 1, "not from the package root", id="root"),
        pytest.param("utils.py", "import os", 1, "utils has no place in the import order", id="unknown-module"),
        pytest.param("layers/jet.py", "from fla.ops import kda", 1, "only ops may import fla", id="fla"),
        pytest.param("sleep.py", "import triton", 1, "only ops may import triton", id="triton"),
        pytest.param(
            "sleep.py",
            "import importlib\nimportlib.import_module('fla.ops')",
            2,
            "only ops may import fla",
            id="dynamic",
        ),
        pytest.param(
            "modeling.py", "from transformers.models.llama import modeling_llama", 1, "a model family", id="family"
        ),
        pytest.param("auto.py", "from transformers import Qwen3ForCausalLM", 1, "a model family", id="family-class"),
        pytest.param(
            "modeling.py", "from transformers import Trainer", 1, "only training may import Trainer", id="trainer"
        ),
        pytest.param(
            "auto.py", "import transformers.trainer", 1, "only training may import Trainer", id="trainer-module"
        ),
        pytest.param("sleep.py", "def f(x):\n    print(x)", 2, "only cli may print", id="print"),
        pytest.param("data/depo.py", "print('rows')", 1, "only cli may print", id="print-in-data"),
    ],
)
def test_a_violation_is_reported_where_it_stands(
    tmp_path: Path, path: str, source: str, line: int, reason: str
) -> None:
    write(tmp_path, path, source)
    code, lines = check(tmp_path)
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith(f"hf_sleep/{path}:{line}: ")
    assert reason in lines[0]


def test_every_violation_is_reported(tmp_path: Path) -> None:
    write(tmp_path, "ops.py", "from .cli import main\nfrom .sleep import wake\nprint()")
    write(tmp_path, "hub.py", "import fla")
    code, lines = check(tmp_path)
    assert code == 1
    assert len(lines) == 4


def test_an_empty_tree_is_a_failure(tmp_path: Path) -> None:
    code, lines = check(tmp_path)
    assert code == 1
    assert "no Python files" in lines[0]


def test_what_the_design_allows_passes(tmp_path: Path) -> None:
    for path, source in {
        "__init__.py": "from .cli import main\nfrom .bases.ouro import Ouro\nfrom .ops import gated",
        "config.py": "from transformers import AutoConfig\nfrom .version import __version__",
        "ops.py": "import importlib\nfrom fla.ops import kda\nimport triton\nfrom . import checks",
        "layers/jet.py": "from .block import Block\nfrom ..ops import gated",
        "state.py": "from .cache import SleepCache\nfrom .hub import card",
        "bases/ouro.py": "from transformers.models.llama import modeling_llama\nfrom ..layers.jet import Jet",
        "bases/decoder.py": "from transformers import Qwen3ForCausalLM\nfrom .ouro import A\nfrom ..memory import KV",
        "auto.py": "from transformers.models.auto import modeling_auto\nfrom transformers import AutoModelForCausalLM",
        "training/trainer.py": "from transformers import Trainer\nfrom ..auto import Auto\nfrom ..data import depo",
        "cli.py": "from .training import trainer\nfrom .session import Session\nprint('hello')",
    }.items():
        write(tmp_path, path, source)
    assert check(tmp_path) == (0, ["imports: every dependency points one way"])
