"""The recipes that train small hybrids from scratch, run for a few steps, and what they leave behind."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch

from hf_sleep import SleepForCausalLM
from hf_sleep.data import Depo, KHop, Rule110

RECIPES = Path(__file__).parents[1] / "recipes"
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
def test_a_recipe_trains_compares_and_writes_everything_down(recipe, name, more, tmp_path, capsys):
    folder = tmp_path / "run"
    results = recipe(name).main([*QUICK, *more.split(), "--output", str(folder)])
    seeds = [0, 1] if "--seeds" in more else [0]
    assert [(r["seed"], r["sleep_passes"]) for r in results] == [(seed, n) for seed in seeds for n in (1, 2)]
    assert json.loads((folder / "config.json").read_text())["settings"]["steps"] == 4
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
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
        assert "| accuracy" in (folder / f"N{n}-seed0" / "README.md").read_text().lower()
    with pytest.raises(SystemExit, match="holds a run already: choose another --output"):
        recipe(name).main([*QUICK, "--output", str(folder)])


def test_models_that_are_compared_start_alike(recipe):
    make = recipe("from_scratch").hybrid
    one, three = make(40, 10, 1, seed=3), make(40, 10, 3, seed=3)
    for name, tensor in one.state_dict().items():
        assert torch.equal(three.state_dict()[name], tensor), name
    assert not torch.equal(make(40, 10, 1, seed=4).lm.lm_head.weight, one.lm.lm_head.weight)
    assert one.fast_weights["0"].mixer.o_proj.weight.std() > 0.01


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
    spread = recipe("run_folder").mean_and_spread
    assert spread([0.5]) == "0.50"
    assert spread([0.0, 1.0]) == "0.50±0.71"


def test_a_run_goes_on_only_with_the_settings_it_began_with(recipe, tmp_path):
    folder = recipe("run_folder").RunFolder
    folder(tmp_path / "run", {"steps": 4}).record(loss=1.0)
    folder(tmp_path / "run", {"steps": 4}, resume=True).record(loss=0.5)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    with pytest.raises(SystemExit, match=r"begun with other settings, \{'steps': \(4, 5\)\}"):
        folder(tmp_path / "run", {"steps": 5}, resume=True)
