"""Files that the package and its recipes write are there whole or not at all, and are UTF-8 on every machine."""

import ast
import json
import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from families import make_model, sleep_config, tokens

from hf_sleep import SleepState
from hf_sleep.files import write_file
from hf_sleep.hub import forget_folders, write_model_card, write_remote_code

ROOT = Path(__file__).parents[1]
STEPS = {"the disk is full": (os, "fsync"), "the file is held by another": (Path, "replace")}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=STEPS)
def broken(request, monkeypatch):
    """Writing fails in its middle; the fixture says how."""

    def fail(*_, **__):
        raise OSError(request.param)

    monkeypatch.setattr(*STEPS[request.param], fail)
    return request.param


@pytest.mark.parametrize("content", ["Bär · 熊\n", b"\x00\r\n\xff"], ids=["text", "bytes"])
def test_what_was_written_is_read_back(content, tmp_path):
    for _ in range(2):
        write_file(tmp_path / "a.txt", content)
        assert contents(tmp_path) == {"a.txt": content.encode() if isinstance(content, str) else content}


def test_a_crash_leaves_the_old_file_and_nothing_else(broken, tmp_path):
    (tmp_path / "old").write_bytes(b"old")
    for name in ("old", "new"):
        with pytest.raises(OSError, match=broken):
            write_file(tmp_path / name, "new")
    assert contents(tmp_path) == {"old": b"old"}


def test_another_reader_never_sees_half_a_file(tmp_path):
    path, versions = tmp_path / "file", {bytes([n]) * 300_000 for n in range(4)}
    path.write_bytes(min(versions))
    seen, done = set(), threading.Event()

    def read():
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(10):
        for version in versions:
            write_file(path, version)
    done.set()
    reader.join()
    assert seen <= versions


@pytest.mark.skipif(os.name != "posix", reason="permissions and links are POSIX's")
def test_permissions_and_links_stay(tmp_path):
    kept, link, plain = tmp_path / "kept", tmp_path / "link", tmp_path / "plain"
    kept.write_bytes(b"old")
    kept.chmod(0o640)
    link.symlink_to(kept)
    write_file(link, "new")
    assert link.is_symlink()
    assert kept.read_bytes() == b"new"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o640
    # A new file is as others are that this process makes.
    plain.touch()
    write_file(tmp_path / "new", "")
    assert (tmp_path / "new").stat().st_mode == plain.stat().st_mode


def test_only_files_are_replaced(tmp_path):
    for place in (tmp_path, Path(os.devnull)):
        with pytest.raises(OSError, match="not a regular file"):
            write_file(place, "text")
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "missing" / "file", "text")
    assert contents(tmp_path) == {}


def state(folder, model):
    SleepState.from_cache(model, model(tokens(7)[None], use_cache=True).cache).save(folder / "state.safetensors")


def run_folder(folder, _):
    from shared.run_folder import RunFolder

    RunFolder(folder, {"seed": 1})


def metrics(folder, _):
    run(folder).record(loss=1.0)


def plot(folder, _):
    run(folder).plot({"N = 1": {2: [0.5]}}, {2: 0.1}, "hops")


def run(folder):
    from shared.run_folder import RunFolder

    it = object.__new__(RunFolder)
    it.path, it.metrics, it.writes = folder, folder / "metrics.jsonl", True
    return it


WRITERS = {
    "state.safetensors": state,
    "README.md": lambda folder, model: write_model_card(model, folder),
    "modeling_hf_sleep.py": lambda folder, _: write_remote_code(folder),
    "config.json of a run": run_folder,
    "metrics.jsonl": metrics,
    "accuracy.png": plot,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_that_is_ours_is_written_so(name, broken, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    with torch.no_grad(), pytest.raises(OSError, match=broken):
        WRITERS[name](tmp_path, make_model("llama", sleep_config("llama")))
    assert contents(tmp_path) == {}


def test_a_config_is_whole_while_its_folders_are_forgotten(broken, tmp_path):
    config = json.dumps({"base_model_name_or_path": "/here", "text_config": {}})
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(OSError, match=broken):
        forget_folders(tmp_path)
    assert contents(tmp_path) == {"config.json": config.encode()}


def names_its_encoding(call: ast.Call) -> bool:
    """Tell whether a call is not one that opens text in whatever encoding the machine happens to have."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name not in ("open", "read_text", "write_text") or ast.unparse(function) == "os.open":
        return True
    modes = [node.value for node in call.args[:2] if isinstance(node, ast.Constant)]
    return any(keyword.arg == "encoding" for keyword in call.keywords) or (name == "open" and {"rb", "xb"} & {*modes})


@pytest.mark.parametrize("folder", ["hf_sleep", "recipes", "scripts", "tests"])
def test_text_files_are_utf_8_wherever_they_are_read(folder):
    """Windows has another default."""
    paths = list((ROOT / folder).rglob("*.py"))
    assert paths
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and not names_its_encoding(node)
    ]
    assert not calls
