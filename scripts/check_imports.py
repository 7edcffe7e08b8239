"""Check that dependencies inside hf_sleep point one way, and that each outside library has one place.

Reads the source with `ast`, imports nothing of it. Usage: python scripts/check_imports.py [repository root]
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "hf_sleep"
# A module may import only from the groups before its own; members of one group do not see each other.
ORDER = """version compat files packing dtypes registry checks labels | data placement generation | ops | memory
    | layers | bases | engine | sleep | config | lm_config | hub cache weights | static_cache state turns | modeling
    | auto lora info suggest | held | idle report streaming store | steps | saved | session
    | batching training pipeline | eval | serve | cli"""
ALLOWED: dict[str, set[str]] = {}
for group in ORDER.split("|"):
    before = set(ALLOWED)
    ALLOWED |= {name: set(before) for name in group.split()}
ALLOWED["data"] = {"labels"}  # tasks are plain code, and know nothing of a sleep
for name in ALLOWED.keys() - {"training", "pipeline", "eval", "cli"}:
    ALLOWED[name].discard("data")
EVERYTHING = {"__init__", "__main__"}  # the package's own front doors import what they like


def imported_names(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, dotted name as parts) of every import, wherever it stands; `package` resolves relative ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            for alias in node.names:
                yield node.lineno, [*base, *(node.module.split(".") if node.module else []), alias.name]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):  # a name put together at run time is beyond this check
                    yield node.lineno, str(argument.value).split(".")


def objection(module: str, parts: list[str]) -> str | None:
    """Say why `module` (a top-level name in the package) may not import `parts`, or return None if it may."""
    dotted = ".".join(parts)
    if parts[0] == PACKAGE and module not in EVERYTHING:
        target = parts[1] if len(parts) > 1 else ""
        if target not in ALLOWED:
            return f"import {dotted} from the module that defines it, not from the package root"
        if target != module and target not in ALLOWED[module]:
            return f"{module} may not import {target}: dependencies point one way"
    if parts[0] in ("fla", "triton") and module != "ops":
        return f"only ops may import {parts[0]}"
    if parts[0] == "transformers" and len(parts) > 1:
        family = parts[1:2] == ["models"] and parts[2:3] != ["auto"]
        family |= parts[-1].endswith("ForCausalLM") and not parts[-1].startswith("Auto")
        if family and module != "bases":
            return f"only bases may know a model family ({dotted})"
        trainer = parts[1] in ("trainer", "trainer_seq2seq") or parts[-1].startswith(("Trainer", "Seq2SeqTrainer"))
        if trainer and module != "training":
            return f"only training may import Trainer ({dotted})"
    return None


def violations(root: Path) -> Iterator[str]:
    files = sorted((root / PACKAGE).rglob("*.py"))
    if not files:
        yield f"{root / PACKAGE}:1: no Python files to check"
    for path in files:
        relative = path.relative_to(root)
        module = relative.with_suffix("").parts[1]
        if module not in ALLOWED and module not in EVERYTHING:
            yield f"{relative}:1: {module} has no place in the import order (ORDER in scripts/check_imports.py)"
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for line, parts in imported_names(tree, list(relative.parent.parts)):
            if message := objection(module, parts):
                yield f"{relative}:{line}: {message}"
        for node in ast.walk(tree) if module != "cli" else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                yield f"{relative}:{node.lineno}: only cli may print"


if __name__ == "__main__":
    found = list(violations(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]))
    print("\n".join(found) or "imports: every dependency points one way")
    sys.exit(bool(found))
