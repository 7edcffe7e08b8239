"""The recipes that train small hybrids from scratch, run for a few steps, and what they write down."""

import dataclasses
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from hf_sleep import SleepForCausalLM
from hf_sleep.data import Depo, KHop, Rule110

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
MAX = dist.ReduceOp.MAX
QUICK = ["--steps", "4", "--batch-size", "8", "--test-rows", "32", "--evaluations", "2", "--sleep-passes", "1", "2"]


@pytest.fixture
def recipe(monkeypatch):
    """Imports a recipe by its name."""
    monkeypatch.syspath_prepend(str(RECIPES))
    return import_module


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("train_khop", "--eval-passes 3 --seeds 0 1"),
        ("train_rule110", "--width 5 --automaton-steps 1 --block-kind jet"),
        ("train_depo", "--max-nodes 6 --layers 2"),
    ],
)
def test_a_recipe_trains_compares_and_writes_everything_down(recipe, name, more, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    results = recipe(name).main([*QUICK, *more.split(), "--output", str(folder)])
    seeds = [0, 1] if "--seeds" in more else [0]
    assert [(r["seed"], r["sleep_passes"]) for r in results] == [(seed, n) for seed in seeds for n in (1, 2)]
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["settings"]["steps"] == 4
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["model"] for row in rows} == {f"N{n}-seed{seed}" for seed in seeds for n in (1, 2)}
    assert any("loss" in row for row in rows)
    assert any("eval_chance" in row for row in rows)
    assert (folder / "accuracy.png").stat().st_size > 5_000
    printed = capsys.readouterr().out
    assert "| chance |" in printed
    assert "step     4/4" in printed
    for n in (1, 2):
        model = SleepForCausalLM.from_pretrained(folder / f"N{n}-seed0")
        assert model.config.sleep.sleep_passes == n
        card = (folder / f"N{n}-seed0" / "README.md").read_text(encoding="utf-8")
        assert "| accuracy" in card.lower()
        counts = map(int, re.findall(r"^\| \w+ \| \d+ \| \d+ \| [\d.]+ \| [\d.]+ \| (\d+) \|$", card, re.MULTILINE))
        evaluated = {"train_khop": 2 * 32 * 8, "train_rule110": 32, "train_depo": 32 * 4}[name]
        assert sum(counts) == evaluated
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(folder)
    exec(snippet, {})
    assert re.search(r"\[\(\d+, (True|False)\)", capsys.readouterr().out)
    with pytest.raises(SystemExit, match="holds a run already: choose another --output"):
        recipe(name).main([*QUICK, "--output", str(folder)])


def test_a_pretrained_model_is_made_once_and_retrofitted_arm_by_arm(recipe, tmp_path, capsys):
    module, base, output = recipe("retrofit_khop"), tmp_path / "base", tmp_path / "run"
    command = ["--base", str(base), "--output", str(output), "--num-nodes", "5", "--layers", "4", "--hidden-size", "32"]
    command += ["--pretrain-steps", "2", "2", "--steps", "2", "--batch-size", "4", "--test-rows", "8"]
    command += ["--sleep-passes", "1", "2", "--eval-passes", "1"]
    results = module.main([*command, "--arms", "all", "middle", "middle-gate", "all-blocks-middle", "middle-reset"])
    models = {*itertools.product(["all", "middle"], [1, 2])}
    models |= {(arm, 2) for arm in ("middle-gate", "all-blocks-middle", "middle-reset")}  # with one pass nothing loops
    made = {f"{train}-{arm}-N{n}-seed0-2" for train in ("blocks", "whole") for arm, n in models}
    assert {file.stem for file in output.glob("*.json")} == made
    by_arm = {(r["train"], r["arm"], r["sleep_passes"]): r for r in results}
    assert by_arm["blocks", "all", 2]["sleep"]["loop_layers"] == [0, 4]
    assert by_arm["blocks", "all", 2]["sleep"]["block_layers"] == [1, 3]
    assert by_arm["whole", "middle", 1]["sleep"]["loop_layers"] == [1, 3]
    assert by_arm["whole", "middle", 1]["sleep"]["block_layers"] == [1, 2]
    assert by_arm["blocks", "all", 1]["parameters_trained"] < by_arm["whole", "all", 1]["parameters_trained"]
    assert by_arm["whole", "middle-gate", 2]["sleep"]["between"] == "gate"
    assert by_arm["whole", "all-blocks-middle", 2]["sleep"]["loop_layers"] == [0, 4]
    assert by_arm["whole", "all-blocks-middle", 2]["sleep"]["block_layers"] == [1, 2]
    assert by_arm["whole", "middle-reset", 2]["grad_norm"] != by_arm["whole", "middle", 2]["grad_norm"]
    for r in results:
        assert set(r["accuracy"]) == {"1", str(r["sleep_passes"])}
        assert len(r["loss"]) == len(r["largest_norm"]) == 1
        assert r["grad_norm"]["max"] == pytest.approx(max(r["largest_norm"]), abs=1e-3)
        assert r["untrained"].keys() == r["last_window_alone"].keys() == {"1", "2", "3"}
    assert "| train | arm | N | steps | k = 1 |" in capsys.readouterr().out
    written = {file: file.stat().st_mtime_ns for file in [*output.glob("*.json"), base / "model.safetensors"]}
    assert module.main([*command, "--arms", "all"]) == [r for r in results if r["arm"] == "all"]
    assert {file: file.stat().st_mtime_ns for file in written} == written
    others = {"batch-size 8": "4, 8", "block-kind jet": "jet", "muon-learning-rate 0": "0.06, None"}
    others |= {"num-nodes 6": "20, 24", "layers 8": "4, 8", "num-names 9": "vocab_size", "test-rows 9": "8, 9"}
    for other, said in others.items():
        with pytest.raises(SystemExit, match=f"was made with other settings, .*{said}"):
            module.main([*command, "--arms", "all", *f"--{other}".split()])
    with pytest.raises(SystemExit, match="was not asked with N = 3"):
        module.main([*command, "--arms", "all", "--eval-passes", "3"])
    assert {file: file.stat().st_mtime_ns for file in written} == written
    assert module.rates(module.Arguments(muon_learning_rate=0.0), "whole")[0] == 0.0
    with pytest.raises(SystemExit):
        module.main([*command, "--arms", "most"])


@pytest.mark.parametrize("name", sorted(file.stem for file in RECIPES.glob("*.py")))
def test_every_recipe_says_what_it_needs_to_who_runs_it(name):
    """`uv run` reads it, in comments before the docstring."""
    text = (RECIPES / f"{name}.py").read_text(encoding="utf-8")
    (block,) = re.findall(r"\A# /// script\n((?:#.*\n)+?)# ///\n", text)
    needs = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))
    project = tomllib.loads((RECIPES.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert needs["requires-python"] == project["requires-python"]
    (ours,) = [needed for needed in needs["dependencies"] if needed.startswith(project["name"])]
    extras = re.search(r"\[(.*)\]", ours)
    assert extras is None or set(extras[1].split(",")) <= set(project["optional-dependencies"])
    assert (RECIPES / needs["tool"]["uv"]["sources"][project["name"]]["path"]).resolve() == RECIPES.parent


@pytest.mark.parametrize("name", sorted(file.stem for file in RECIPES.glob("*.py")))
def test_every_recipe_says_its_arguments_and_their_defaults(recipe, name, capsys):
    if name == "lm_evaluation":
        pytest.importorskip("lm_eval", reason="the recipe's own requirement, which its header names")
    with pytest.raises(SystemExit, match="0"):
        recipe(name).main(["--help"])
    # argparse breaks lines after a hyphen too.
    said = re.sub(r"(?<=\w-) (?=\w)", "", " ".join(capsys.readouterr().out.split()))
    kind = recipe(name).Arguments
    for field in dataclasses.fields(kind):
        assert not field.init or re.search(
            rf"--{field.name.replace('_', '-')} .*{re.escape(field.metadata['help'])}", said
        )
    assert not getattr(kind, "output", None) or f"a folder (default: {kind.output})" in said


def test_a_recipe_runs_from_anywhere(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        str(RECIPES / "train_khop.py"),
        "--steps",
        "1",
        "--sleep_passes",
        "2",
        "--batch-size",
        "4",
    ]
    command += ["--test-rows", "8", "--evaluations", "1", "--output", "here"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "here" / "N2-seed0" / "model.safetensors").exists()


@dataclasses.dataclass
class Some:
    preset: str = dataclasses.field(default="plain", metadata={"choices": ("plain", "on")})
    switch: bool = False
    pair: list[int] | None = None
    name: str = dataclasses.field(init=False)

    def __post_init__(self):
        import_module("shared.arguments").require_pair("pair", self.pair)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("here", (False, None)),
        ("here --switch --pair 1 2", (True, [1, 2])),
        ("here --switch false", (False, None)),
        ("here --preset on", (True, [3, 4])),
        ("--preset on --no-switch --pair 5 6 -- here", (False, [5, 6])),
    ],
)
def test_arguments_are_a_dataclass(recipe, arguments, expected):
    """A preset stands where no argument is given, and every switch can be switched off."""
    presets = {"plain": {}, "on": {"switch": True, "pair": [3, 4]}}
    parse = recipe("shared.arguments").parse
    made = parse(Some, "", arguments.split(), presets, {"name": {}})
    assert type(made) is Some
    assert (made.name, made.switch, made.pair) == ("here", *expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("here --pair 1", "--pair 1: it takes two numbers"),
        ("here --speed 3", "--speed"),
        ("--preset off here", "preset"),
    ],
)
def test_arguments_that_cannot_work_are_refused(recipe, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        recipe("shared.arguments").parse(Some, "", arguments.split(), {"plain": {}}, {"name": {}})
    assert message in capsys.readouterr().err


def test_two_processes_train_as_one_and_write_once(recipe, tmp_path):
    options = [*QUICK, "--evaluations", "1"]
    recipe("train_khop").main([*options, "--output", str(tmp_path / "one")])
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", "recipes/accelerate/cpu.yaml", "--main_process_port", "0", "recipes/train_khop.py"]
    done = subprocess.run(
        [*command, *options, "--batch-size", "4", "--output", str(tmp_path / "two")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("| chance |") == 1
    assert done.stdout.count("step     4/4") == 2
    losses = []
    for name in ("one", "two"):
        rows = [
            json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        losses.append([row["loss"] for row in rows if "loss" in row])
    one, two = (sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*")) for n in ("one", "two"))
    assert one == two
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_models_that_are_compared_start_alike(recipe):
    make = recipe("shared.from_scratch").hybrid
    one, three = make(40, 10, 1, seed=3), make(40, 10, 3, seed=3)
    for name, tensor in one.state_dict().items():
        assert torch.equal(three.state_dict()[name], tensor), name
    assert not torch.equal(make(40, 10, 1, seed=4).lm.lm_head.weight, one.lm.lm_head.weight)
    assert one.fast_weights["0"].mixer.o_proj.weight.std() > 0.01


@pytest.mark.parametrize("kind", ["jet", "gated_delta_net"])
def test_the_seed_is_of_every_weight(recipe, kind):
    """A retrofit's blocks follow from its base; what is trained from nothing follows from the seed."""
    hybrid = recipe("shared.from_scratch").hybrid
    first, again, other = (hybrid(20, 8, 2, block_kind=kind, seed=seed).state_dict() for seed in (1, 1, 2))
    constant = {name for name, value in first.items() if not value.std(unbiased=False)}
    same = {name for name, value in first.items() if torch.equal(value, other[name])}
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert {name for name in same - constant if not name.endswith("w2.bias")} == set()


def test_other_numbers_of_passes_are_evaluated_on_the_same_model(recipe, tmp_path):
    (result,) = recipe("train_khop").main(
        [*QUICK, "--sleep-passes", "2", "--eval-passes", "1", "3", "--output", str(tmp_path / "run")]
    )
    assert result["accuracy"].keys() == {2, 1, 3}
    assert all(scores.keys() == {1, 2, 3, 4} for scores in result["accuracy"].values())


@pytest.mark.parametrize(
    ("name", "task", "layers"),
    [("train_rule110", Rule110.paper(), 2), ("train_depo", Depo.paper(), 5)],
)
def test_the_papers_preset_is_the_papers_task(recipe, name, task, layers, monkeypatch, tmp_path):
    module, seen = recipe(name), []
    monkeypatch.setattr(module, "compare", lambda options, task, difficulty: seen.append((options, task)))
    module.main(["--preset", "paper", "--output", str(tmp_path)])
    module.main(["--preset", "paper", "--steps", "7", "--output", str(tmp_path)])
    (options, made), (overridden, _) = seen
    assert made == task
    assert (options.layers, options.muon_learning_rate, options.learning_rate) == (layers, 2e-3, 5e-5)
    assert overridden.steps == 7
    assert overridden.batch_size == options.batch_size


def test_the_default_is_the_smallest_setting_that_was_found(recipe, monkeypatch):
    module, seen = recipe("train_khop"), []
    monkeypatch.setattr(module, "compare", lambda options, task, difficulty: seen.append((options, task)))
    module.main([])
    ((options, task),) = seen
    assert task == KHop(8)
    assert options.sleep_passes == [1, 2, 3]


def test_mean_and_spread(recipe):
    spread = recipe("shared.run_folder").mean_and_spread
    assert spread([0.5]) == "0.50"
    assert spread([0.0, 1.0]) == "0.50±0.71"


def test_a_checkpoint_that_was_cut_short_is_none(recipe, tmp_path):
    last = recipe("shared.run_folder").last_checkpoint
    assert last(tmp_path / "missing") == (None, 0)
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").touch()
        if step < 11:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert last(tmp_path) == (str(tmp_path / "checkpoint-10"), 10)


def test_without_muon_its_matrices_are_trained_too(recipe, tmp_path):
    recipe("train_khop").main([*QUICK, "--muon-learning-rate", "0", "--output", str(tmp_path)])
    start = recipe("shared.from_scratch").hybrid(KHop(8).vocab_size, KHop(8).window_size, 2).state_dict()
    trained = load_file(tmp_path / "N2-seed0" / "model.safetensors")
    assert not any(torch.equal(tensor, start[name]) for name, tensor in trained.items() if tensor.dim() == 2)


def test_a_run_goes_on_only_with_the_settings_it_began_with(recipe, tmp_path, monkeypatch):
    folder = recipe("shared.run_folder").RunFolder
    folder(tmp_path / "run", {"steps": 4}).record(loss=1.0)
    folder(tmp_path / "run", {"steps": 4}, resume=True).record(loss=0.5)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    with pytest.raises(SystemExit, match=r"begun with other settings, \{'steps': \(4, 5\)\}"):
        folder(tmp_path / "run", {"steps": 5}, resume=True)
    with pytest.raises(SystemExit, match=r"holds a run already: choose another --output$"):
        folder(tmp_path / "run", {"steps": 4})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match=r"begun with other settings, \{'processes': \(1, 2\)\}"):
        folder(tmp_path / "run", {"steps": 4}, resume=True)
    monkeypatch.delenv("WORLD_SIZE")
    for minutes in (None, 8.0):
        folder(tmp_path / "run", {"steps": 4, "minutes": minutes, "resume": True}, resume=True)


def without_seconds(results):
    return [{key: value for key, value in result.items() if key != "seconds"} for result in results]


def test_a_comparison_in_parts_ends_as_one_in_one_piece(recipe, tmp_path, capsys):
    main, whole, parts = recipe("train_khop").main, tmp_path / "whole", tmp_path / "parts"
    options = [*QUICK, "--eval-passes", "3"]
    expected = main([*options, "--output", str(whole)])
    capsys.readouterr()
    in_parts = [*options, "--resume", "--output", str(parts)]
    told = []
    for _ in range(5):
        results = main([*in_parts, "--minutes", "0"])
        told += re.findall(r"N = \d, seed 0: stopped at step \d of 4", capsys.readouterr().out)
    # The fifth evaluates the model that the fourth had finished, and begins the other.
    assert [line[4] + line[-6] for line in told] == ["11", "12", "13", "14", "21"]
    assert without_seconds(results) == without_seconds(expected)[:1]
    assert main([*in_parts, "--minutes", "1e6"]) == main(in_parts) == json_results(parts)
    assert without_seconds(main(in_parts)) == without_seconds(expected)
    logs = [json.loads(line) for line in (parts / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for n in (1, 2):
        name = f"N{n}-seed0"
        final, again = (load_file(folder / name / "model.safetensors") for folder in (whole, parts))
        assert final.keys() == again.keys()
        assert all(torch.equal(again[key], tensor) for key, tensor in final.items())
        assert not list((parts / name).glob("checkpoint-*"))
        runs = [row["seconds"] for row in logs if row["model"] == name and "seconds" in row]
        # Four that trained a step each and one that only evaluated; one step, then three.
        assert len(runs) == {1: 5, 2: 2}[n]
        assert json_results(parts)[n - 1]["seconds"] == sum(runs) > 0


def json_results(folder):
    return import_module("shared.from_scratch").finished(folder / "results.json")


# A curriculum: more windows later.


def test_rows_of_a_curriculum_are_those_of_the_step_s_task(recipe):
    options = recipe("train_khop").Arguments(curriculum=["1:2", "2:1", "4:3"])
    task = KHop(8, windows=4)
    steps = [KHop(8, windows=w).rows(7, "train", range(5 * i, 5 * i + 5)) for i, w in enumerate((1, 1, 2, 4, 4, 4, 4))]
    for done in range(7):
        rows = options.training_rows(task, seed=7, done=done, rows_per_step=5).take(5 * (7 - done))
        assert list(rows) == [row for step in steps[done:] for row in step]
    plain = recipe("train_khop").Arguments(windows=4).training_rows(task, seed=7, done=3, rows_per_step=5)
    assert list(plain.take(10)) == task.rows(7, "train", range(15, 25))
    assert {KHop(8, windows=w).window_size for w in range(1, 9)} == {10}


def test_a_curriculum_in_parts_ends_as_one_in_one_piece(recipe, tmp_path):
    """Evaluated on the last stage's task throughout, and with all steps of all stages."""
    main, options = recipe("train_khop").main, [*QUICK[2:], "--sleep-passes", "2", "--curriculum", "1:2", "2:1", "8:1"]
    (expected,) = main([*options, "--output", str(tmp_path / "whole")])
    stages = "2 with windows=1, 1 with windows=2, 1 with windows=8"
    assert expected["data"] == f"{KHop(8, windows=8)}, 4 steps of 8 rows ({stages})"
    for _ in range(4):
        main([*options, "--resume", "--minutes", "0", "--output", str(tmp_path / "parts")])
    (again,) = main([*options, "--resume", "--output", str(tmp_path / "parts")])
    (other,) = main([*QUICK, "--sleep-passes", "2", "--windows", "8", "--output", str(tmp_path / "other")])
    whole, parts, from_the_start = (
        load_file(tmp_path / name / "N2-seed0" / "model.safetensors") for name in ("whole", "parts", "other")
    )
    assert again["accuracy"] == expected["accuracy"]
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    assert not all(torch.equal(from_the_start[name], tensor) for name, tensor in whole.items())
    task = json.loads((tmp_path / "parts" / "N2-seed0" / "task.json").read_text(encoding="utf-8"))
    assert (task["windows"], other["decay_once"]) == (8, False)
    with pytest.raises(SystemExit, match="was begun with other settings"):
        main([*options[:-1], "8:2", "--resume", "--output", str(tmp_path / "parts")])


@pytest.mark.parametrize(
    ("arguments", "between", "decay_once"), [("", "none", False), ("--between gate --decay-once", "gate", True)]
)
def test_what_a_pass_does_is_an_argument_of_all(recipe, arguments, between, decay_once, tmp_path):
    options = [*QUICK, "--sleep-passes", "2", *arguments.split(), "--output", str(tmp_path)]
    (result,) = recipe("train_khop").main(options)
    sleep = SleepForCausalLM.from_pretrained(tmp_path / "N2-seed0").config.sleep
    assert (sleep.between, sleep.decay_once) == (result["between"], result["decay_once"]) == (between, decay_once)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--curriculum 1-500", "--curriculum 1-500: a stage is windows:steps, as 1:500"),
        ("--curriculum 1:500 2:0", "--curriculum 2:0: a stage"),
        ("--curriculum 1:5 2:5 --steps 20", "leave out --windows and --steps"),
        ("--curriculum 1:5 2:5 --windows 4", "leave out --windows and --steps"),
    ],
)
def test_a_curriculum_that_cannot_work_is_refused(recipe, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        recipe("train_khop").main(arguments.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("minutes", "age", "others", "step", "stops", "saves"),
    [
        (None, 1e9, False, 5, False, False),
        (8, 479, False, 3, False, False),
        (8, 479, False, 5, False, True),
        (8, 480, False, 3, True, True),
        (8, 0, True, 3, True, True),
    ],
)
def test_the_oldest_process_stops_all(recipe, monkeypatch, minutes, age, others, step, stops, saves):
    module = recipe("shared.run_folder")
    monkeypatch.setattr(module, "process_seconds", lambda: age)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda over, op: over.clamp_(min=int(others)) if op is MAX else None)
    budget, control = module.TimeBudget(minutes), SimpleNamespace(should_training_stop=False, should_save=False)
    state = SimpleNamespace(global_step=step, max_steps=5)
    budget.on_step_end(SimpleNamespace(device=torch.device("cpu")), state, control)
    assert (control.should_training_stop, control.should_save) == (stops, saves)
    assert bool(budget.stopped) == stops


def test_a_process_is_as_old_as_its_imports(recipe):
    assert 0.5 < recipe("shared.run_folder").process_seconds() < 86_400


def commands(page):
    """Recipe and arguments of every command on a page."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("python ")]
    return [(Path(recipe).stem, arguments) for _, recipe, *arguments in map(shlex.split, lines)]


def test_the_gpu_pages_commands_are_what_it_says(recipe, monkeypatch):
    seen = {}
    for name, arguments in commands("docs/results/gpu.md"):
        module = recipe(name)
        if name == "finetune_gsm":
            options = module.parse_arguments(arguments)
        else:
            monkeypatch.setattr(module, "compare", lambda *given: given[:2])
            options, options.task = module.main(arguments)
        assert str(options.output) not in seen
        seen[str(options.output)] = options
    probe = seen.pop("runs/rule110-probe")
    assert (probe.minutes, probe.task) == (None, Rule110.paper())
    assert all((options.minutes, options.resume) == (8, True) for options in seen.values())
    rule, less, depo, shorter, *gsm = seen.values()
    assert (rule.task, depo.task, shorter.task) == (Rule110.paper(), Depo.paper(), Depo.paper())
    assert (rule.batch_size, rule.steps, rule.sleep_passes) == (512, 97_000, [1, 2, 3, 4])
    assert (depo.batch_size, depo.steps, depo.sleep_passes) == (128, 100_000, [1, 2, 4])
    assert (less.task, less.steps) == (Rule110.paper(8), 4000)
    assert [(o.eviction, o.sleep_passes) for o in gsm] == [(e, n) for e in ("hard", "sliding") for n in (1, 2, 4)]
    for options in gsm:
        assert options.batch_size * options.gradient_accumulation_steps == 256
        assert (options.muon_learning_rate, options.learning_rate, options.whole_model) == (1e-3, 5e-5, True)
        assert (options.ops, options.tokens, options.window_size) == ([1, 8], [500, 825], 128)
        assert (options.num_blocks, options.eval_problems, options.steps) == (6, 1600, 300)
        assert options.hard_warmup_steps == (100 if options.eviction == "sliding" else 0)
