"""The `hf-sleep` command, run on folders that hold a config.json and nothing else."""

import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from families import make_base, sleep_config
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging
from typer.testing import CliRunner, Result

import hf_sleep_command
from hf_sleep import SleepConfig, SleepForCausalLM, SleepLMConfig, __version__
from hf_sleep.cli import app
from hf_sleep.config import REGISTRIES, SETTINGS
from hf_sleep.info import describe

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _verbosity():
    """The command silences transformers' warnings in its process, which here is pytest's."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture
def base(tmp_path: Path) -> str:
    make_base("llama").config.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    sleep = sleep_config("qwen3_next", sleep_passes=3, eviction="sliding", loop_layers=(1, 3))
    SleepLMConfig(text_config=make_base("qwen3_next").config, sleep=sleep).save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


def run(*arguments: str, width: int = 80) -> Result:
    return CliRunner(env={"COLUMNS": str(width), "NO_COLOR": None, "FORCE_COLOR": None}).invoke(app, arguments)


def read(*arguments: str) -> dict:
    result = run("info", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_base_is_described_with_the_library_s_defaults(base: str) -> None:
    assert read(base) == describe(AutoConfig.from_pretrained(base)).to_dict()


def test_a_checkpoint_is_described_as_it_was_saved(checkpoint: str) -> None:
    found = read(checkpoint)
    assert found == describe(AutoConfig.from_pretrained(checkpoint)).to_dict()
    assert found["is_checkpoint"]
    assert (found["sleep"]["sleep_passes"], found["sleep"]["eviction"]) == (3, "sliding")


@pytest.mark.parametrize(
    ("option", "value", "field", "expected"),
    [
        ("--window-size", "7", "window_size", 7),
        ("--sleep-passes", "5", "sleep_passes", 5),
        ("--eviction", "sliding", "eviction", "sliding"),
        ("--num-sink-tokens", "3", "num_sink_tokens", 3),
        ("--loop-layers", "1:3", "loop_layers", [1, 3]),
        ("--num-blocks", "2", "block_layers", [1, 2]),
        ("--block-layers", "0,2,3", "block_layers", [0, 2, 3]),
        ("--block-kind", "gated_delta_net", "block_kind", "gated_delta_net"),
        ("--block-num-heads", "3", "block_num_heads", 3),
        ("--block-head-dim", "4", "block_head_dim", 4),
        ("--block-expand-v", "1.5", "block_expand_v", 1.5),
        ("--block-conv-size", "3", "block_conv_size", 3),
        ("--block-half-lives", "0.5:8", "block_half_lives", [0.5, 8.0]),
    ],
)
def test_every_option_sets_its_field(base: str, option: str, value: str, field: str, expected: object) -> None:
    plain, found = read(base), read(base, option, value)
    assert plain["sleep"][field] != expected
    assert found["sleep"][field] == expected
    assert found != plain


def test_the_dtype_decides_the_bytes(base: str) -> None:
    AutoConfig.from_pretrained(base, dtype="float16").save_pretrained(base)
    assert read(base)["dtype"] == "float16"
    assert read(base, "--dtype", "float32")["kv_bytes"] == 2 * read(base, "--dtype", "float16")["kv_bytes"]


def test_a_checkpoint_s_settings_can_be_overridden_but_not_its_blocks(checkpoint: str) -> None:
    found = read(checkpoint, "--sleep-passes", "4")
    assert (found["sleep"]["sleep_passes"], found["sleep"]["eviction"]) == (4, "sliding")
    result = run("info", checkpoint, "--num-blocks", "3")
    assert result.exit_code == 1
    assert "the checkpoint's blocks have num_blocks=1. Leave it out" in result.stderr


def test_what_a_reader_sees_of_a_base(base: str) -> None:
    found = describe(AutoConfig.from_pretrained(base))
    result = run("info", base, "--loop-layers", "1:3", "--sleep-passes", "3", "--num-blocks", "2", width=100)
    assert result.exit_code == 0
    assert not result.stderr
    assert "    0  FF+F+F\n        ==== \n" in result.stdout
    assert "llama, 4 layers of width 32, 31.8 k parameters" in result.stdout
    assert "+  jet block, injected after layers 1, 2: 1 head of 8 keys x 16 values" in result.stdout
    assert "=  layers 1..2 of 4: 3 passes over every window, with a step between them: gate" in result.stdout
    assert f"512 tokens of {found.kv_bytes_per_token} bytes" in result.stdout
    assert "sleep, 2 more passes" in result.stdout


def test_what_a_reader_sees_of_a_checkpoint(checkpoint: str) -> None:
    result = run("info", checkpoint)
    assert "sleep checkpoint of qwen3_next, 4 layers" in result.stdout
    assert "    0  LF+LF\n        === \n" in result.stdout
    assert "L  linear attention, 2 layers" in result.stdout
    assert "F  full attention, 2 layers" in result.stdout


@pytest.mark.parametrize(("width", "rows"), [(80, 2), (120, 1)])
def test_lines_fit_and_carry_no_colour_codes(tmp_path: Path, width: int, rows: int) -> None:
    deep = AutoConfig.for_model("llama", num_hidden_layers=60, hidden_size=64, num_attention_heads=4)
    deep.save_pretrained(tmp_path)
    settings = ("--eviction", "sliding", "--num-sink-tokens", "4", "--loop-layers", "0:60")
    result = run("info", str(tmp_path), *settings, width=width)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert max(map(len, result.stdout.replace(str(tmp_path), "").splitlines())) <= width
    strip = re.findall(r"^ +\d+  ([F+ ]+)$", result.stdout, re.MULTILINE)
    assert len(strip) == rows
    assert ("".join(strip).count("F"), "".join(strip).count("+")) == (60, 15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--loop-layers", "2:9"], "SleepConfig.loop_layers=(2, 9) cannot work: the base has 4", id="loop"),
        pytest.param(["--eviction", "soft"], "SleepConfig.eviction='soft' cannot work", id="eviction"),
        pytest.param(["--window-size", "4096"], "the base addresses 2048: use at most 2048", id="positions"),
        pytest.param(["--num-blocks", "0"], "inject at least one", id="nothing to remember"),
    ],
)
def test_impossible_settings_are_one_line(base: str, arguments: list[str], message: str) -> None:
    result = run("info", base, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_what_is_no_base_is_one_line(tmp_path: Path) -> None:
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path / "gpt2")
    (tmp_path / "empty").mkdir()
    for name, extra in [("unknown", {}), ("remote", {"auto_map": {"AutoConfig": "configuration.PerceptronConfig"}})]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "perceptron"} | extra), encoding="utf-8")
    for model, message in [
        (tmp_path / "gpt2", "no decoder adapter for model_type='gpt2'"),
        (tmp_path / "empty", "Should have a `model_type` key in its config.json"),
        (tmp_path / "unknown", "model type `perceptron`"),
        (tmp_path / "remote", "contains custom code which must be executed"),
        (tmp_path / "missing", f"there is no folder {tmp_path / 'missing'}"),
        ("./missing", "there is no folder ./missing"),
        ("nobody/nothing", "We couldn't connect to 'https://huggingface.co'"),
    ]:
        result = run("info", str(model))
        assert (result.exit_code, result.stdout) == (1, "")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loop-layers", "7-21"], "Invalid value for '--loop-layers': '7-21' is not a row of integers with ':'"),
        (["--block-layers", "a,b"], "Invalid value for '--block-layers': 'a,b' is not a row of integers with ','"),
        (["--dtype", "int8"], "Invalid value for '--dtype': 'int8' is not a floating dtype of torch"),
        (["--dtype", "manual_seed"], "Invalid value for '--dtype': 'manual_seed' is not a floating dtype of torch"),
        (["--window-size", "many"], "Invalid value for '--window-size'"),
        (["--passes", "2"], "No such option: --passes"),
    ],
)
def test_what_cannot_be_read_is_a_usage_error(base: str, arguments: list[str], message: str) -> None:
    result = run("info", base, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_the_help_shows_the_defaults_of_the_library() -> None:
    result = run("info", "--help", width=200)
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    for name, field in SETTINGS.items():
        assert f"--{name.replace('_', '-')} " in text
        default = getattr(SleepConfig(), name)
        default = ":".join(map(str, default)) if isinstance(default, tuple) else default
        meaning = field.metadata["help"].split(" None: ")[0]
        shown = re.search(rf"{re.escape(meaning)}(?: \[default, of a base: (\S+)\])?", text)
        assert shown, name
        assert shown[1] == (None if default is None else str(default))


def test_the_help_names_every_choice() -> None:
    for field, registry in REGISTRIES.items():
        own = [name for name in registry.names() if registry.module_of(name) is None]
        meaning = SETTINGS[field].metadata["help"]
        assert f": {' or '.join(own)}." in meaning or re.findall(r"(\w+):", meaning) == own


def test_the_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"{__version__}\n")


def test_without_a_command_it_shows_its_help() -> None:
    assert "info" in run().output


def test_the_installed_command_is_this_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, name = project["scripts"]["hf-sleep"].split(":")
    assert getattr(importlib.import_module(module), name) is hf_sleep_command.main


def run_in_a_new_process(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["info", "--help"]], ids=" ".join)
def test_help_imports_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = """
import atexit, sys
from hf_sleep_command import main
atexit.register(lambda: print(sorted({"torch", "transformers"} & set(sys.modules))))
main()
"""
    shown = run_in_a_new_process(code, *arguments)
    assert shown.endswith("\n[]\n")
    assert len(shown) > len("[]\n")


def test_the_command_alone_knows_our_model_types(checkpoint: str) -> None:
    code = """
import sys
from hf_sleep_command import main
for model in sys.argv[1:]:
    sys.argv = ["hf-sleep", "info", model, "--json"]
    try:
        main()
    except SystemExit as end:
        print(end.code, end="\\0")
"""
    models = [checkpoint, "tests/goldens/ouro", "tests/goldens/jet_nemotron"]
    expected = [json.dumps(read(model), indent=2) + "\n0" for model in models]
    assert run_in_a_new_process(code, *models).split("\0") == [*expected, ""]


def test_to_import_hf_sleep_is_enough_for_the_auto_classes(tmp_path: Path) -> None:
    SleepForCausalLM.from_base(make_base("llama"), sleep_config("llama")).save_pretrained(tmp_path / "sleep_lm")
    for name in ("ouro", "jet_nemotron"):
        config = AutoConfig.from_pretrained(ROOT / "tests/goldens" / name)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    code = """
import sys, hf_sleep, transformers
transformers.utils.logging.disable_progress_bar()
for name in ("sleep_lm", "ouro", "jet_nemotron"):
    print(type(transformers.AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}")).__name__)
"""
    shown = run_in_a_new_process(code, str(tmp_path))
    assert shown.split() == ["SleepForCausalLM", "OuroForCausalLM", "JetNemotronForCausalLM"]


def test_hf_sleep_loads_no_terminal_library_until_it_is_run_as_a_command() -> None:
    code = """
import runpy, sys, hf_sleep
print(sorted({"typer", "rich", "hf_sleep.cli", "hf_sleep.info"} & set(sys.modules)))
sys.argv = ["hf_sleep", "--version"]
runpy.run_module("hf_sleep", run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"[]\n{__version__}\n", "")
