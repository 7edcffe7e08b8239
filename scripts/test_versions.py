"""Run the tests that matter most on other releases of transformers, and show a table of what they made of it.

`oldest` is the oldest transformers supported, with everything else as locked. `newest` is the newest that the registry
has, pre-releases included, with the peft and accelerate of the day. Either is installed into a folder under .versions,
which is laid over the locked environment: no other environment is built.

    .venv/bin/python scripts/test_versions.py                  both, all groups
    .venv/bin/python scripts/test_versions.py oldest --laws    one of them, the laws alone
"""

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
# The newest patch of the oldest minor that pyproject.toml admits.
OLDEST = "5.22.2"
INSTALLED = {"oldest": [f"transformers=={OLDEST}"], "newest": ["--pre", "transformers", "peft", "accelerate"]}
GROUPS = {
    "laws": ["test_laws"],
    "generation": ["test_generation", "test_static_cache"],
    "saving": ["test_saving"],
    "state": ["test_state"],
    "memories": ["test_session", "test_batching", "test_store", "test_pipeline"],
    "ports": ["test_jet_nemotron", "test_ouro", "test_models_asleep"],
    "training": ["test_training_trainer"],
}
SHOWN = ("transformers", "peft", "accelerate", "huggingface_hub", "tokenizers", "torch")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def version(name: str, overlay: Path) -> str | None:
    """The release of `name` that is found where `overlay` lies over this environment."""
    found = next(iter(importlib.metadata.distributions(name=name, path=[str(overlay), *sys.path])), None)
    return found.version if found else None


def unmet(overlay: Path) -> Iterator[tuple[str, Requirement]]:
    """Find what the packages in `overlay` ask for and lack: who asks, and for what."""
    for package in importlib.metadata.distributions(path=[str(overlay)]):
        for requirement in map(Requirement, package.requires or []):
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            have = version(requirement.name, overlay)
            if have is None or not requirement.specifier.contains(have, prereleases=True):
                yield f"{package.name} {package.version}", requirement


def install(overlay: Path, *what: str) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q"]
    subprocess.run([*pip, "install", "--no-deps", "--upgrade", "--target", str(overlay), *what], check=True)


def lay_over(run: str, console: Console) -> Path:
    """Make the folder of `run`, with what it needs where the locked release does not do; say so in words.

    Raises:
        SystemExit: where it needs another torch, or where two packages ask for what no release is.
    """
    overlay, partial = ROOT / ".versions" / run, ROOT / ".versions" / f"{run}.partial"
    if run == "oldest" and overlay.exists() and version("transformers", overlay) == OLDEST and not list(unmet(overlay)):
        return overlay
    for folder in (overlay, partial):
        shutil.rmtree(folder, ignore_errors=True)
    install(partial, *INSTALLED[run])
    laid: set[str] = set()
    while missing := list(unmet(partial)):
        for who, requirement in missing:
            have = version(requirement.name, partial) or "none"
            console.print(f"{run}: {who} needs {requirement}, there is {have}")
            if requirement.name == "torch":
                raise SystemExit(f"{run}: a torch is not laid over another. Raise the one in requirements/lock.in")
            if requirement.name in laid:
                raise SystemExit(f"{run}: no release of {requirement.name} suits all that ask for one")
            laid.add(requirement.name)
            install(partial, str(requirement))
    return partial.rename(overlay)


def outcomes(report: Path, groups: list[str]) -> dict[str, Counter[str]]:
    """Count the tests of each group that passed, failed and were skipped, and their seconds, from a JUnit file."""
    group_of = {name: group for group in groups for name in GROUPS[group]}
    counts = {group: Counter[str]() for group in groups}
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        # A file that cannot be imported is a case without a class.
        path = (case.get("classname") or case.get("name") or "").split(".")
        group = next(group_of[part] for part in path if part in group_of)
        failed = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if failed else "skipped" if case.find("skipped") is not None else "passed"
        counts[group].update({outcome: 1, "seconds": float(case.get("time", 0))})
    return counts


def test(run: str, overlay: Path, groups: list[str]) -> tuple[int, dict[str, Counter[str]]]:
    """Run the tests of `groups` with `overlay` over this environment: pytest's exit status, and its outcomes."""
    report = ROOT / ".versions" / f"{run}.xml"
    report.unlink(missing_ok=True)
    files = [f"tests/{name}.py" for group in groups for name in GROUPS[group]]
    path = os.pathsep.join(filter(None, [str(overlay), os.environ.get("PYTHONPATH")]))
    status = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "2", f"--junitxml={report}", *files],
        cwd=ROOT,
        env={**os.environ, **ONE_THREAD, "PYTHONPATH": path},
        check=False,
    ).returncode
    return status, outcomes(report, groups)


def main() -> int:
    parser = argparse.ArgumentParser(description="Test on other releases of transformers.")
    parser.add_argument("runs", nargs="*", metavar="oldest|newest", help="which; by default both")
    parser.add_argument("--laws", action="store_true", help="the laws alone")
    arguments = parser.parse_args()
    if unknown := set(arguments.runs) - set(INSTALLED):
        parser.error(f"unknown: {', '.join(sorted(unknown))}. There are oldest and newest")
    console = Console(highlight=False)
    table = Table("run", "group", "passed", "failed", "skipped", "test seconds", box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    used, worst = [], 0
    for run in arguments.runs or INSTALLED:
        overlay = lay_over(run, console)
        used.append(f"{run}: " + ", ".join(f"{name} {version(name, overlay)}" for name in SHOWN))
        console.print(used[-1], soft_wrap=True)
        start = time.monotonic()
        status, counts = test(run, overlay, ["laws"] if arguments.laws else list(GROUPS))
        seconds = time.monotonic() - start
        worst = worst or status
        for group, count in [*counts.items(), ("all", sum(counts.values(), Counter[str]()))]:
            row = (f"{count[column]:.0f}" for column in ("passed", "failed", "skipped", "seconds"))
            table.add_row(run, group, *row, end_section=group == "all")
        used[-1] += f"; {seconds:.0f} seconds in all, pytest's exit status {status}"
    console.print(table)
    for line in used:
        console.print(line, soft_wrap=True)
    return worst


if __name__ == "__main__":
    sys.exit(main())
