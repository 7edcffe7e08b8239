"""Where to loop: what `suggest_loop` measures, chooses and shows."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import HYBRIDS, make_base, make_model, sleep_config, tokens
from test_cli import run
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_sleep import SleepConfig, SleepForCausalLM, suggest_loop
from hf_sleep.bases.decoder import period_of
from hf_sleep.suggest import MAX_TOKENS, SINK, SINK_STEP, _choice, _sink_change

SOME = ("llama", "gemma3", "gpt_oss", "mistral_window", "qwen3_next", "granitemoehybrid", "jet_nemotron", "ouro")


def repeated(base, first: int, end: int):
    """A copy of a base whose layers from `first` to `end - 1` stand in it twice."""
    layers = list(base.model.layers)
    base.model.layers = torch.nn.ModuleList([*layers[:end], *layers[first:]])
    base.config.num_hidden_layers = len(base.model.layers)
    if getattr(base.config, "layer_types", None):
        kinds = list(base.config.layer_types)
        base.config.layer_types = [*kinds[:end], *kinds[first:]]
    return base


def loss_of(base, ids: torch.Tensor) -> float:
    with torch.no_grad():
        logits = base(ids[None], use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits, ids[1:]).item()


@pytest.mark.parametrize(
    "family", ["llama", "mistral_window", "gemma3", "olmo2", "gpt_oss", "granite", "qwen3_next", "olmo_hybrid"]
)
def test_a_second_run_costs_what_it_costs_by_hand(family):
    """By hand: the base's own forward, with the range's layers standing in it twice."""
    ids = tokens(20)
    found = suggest_loop(make_base(family), text=ids)
    once = loss_of(make_base(family), ids)
    assert found.loss == pytest.approx(once, abs=1e-4)
    for row in found.candidates:
        twice = loss_of(repeated(make_base(family), *row.loop_layers), ids)
        assert row.loss == pytest.approx(twice - once, abs=1e-4)


def test_ouro_s_second_run_is_its_own_second_loop():
    base, ids = make_base("ouro"), tokens(20)
    found = suggest_loop(base, text=ids)
    base.config.total_ut_steps = 2
    (whole,) = (row for row in found.candidates if row.loop_layers == (0, 4))
    assert found.loss + whole.loss == pytest.approx(loss_of(base, ids), abs=1e-4)


def test_angles_and_norms_are_those_by_hand():
    base, ids = make_base("llama"), tokens(20)
    with torch.no_grad():
        states = [x[0] for x in base(ids[None], output_hidden_states=True).hidden_states[:-1]]
    found = suggest_loop(base, text=ids)
    for row, before, after in zip(found.layers, states, states[1:], strict=False):
        angles = torch.tensor([torch.dot(a, b) / a.norm() / b.norm() for a, b in zip(before, after, strict=True)])
        assert row.angle == pytest.approx((angles.arccos() / torch.pi).median().item(), abs=1e-4)
        assert row.norm == pytest.approx(after.norm(dim=-1).median().item(), rel=1e-4)
        assert row.first_norm == pytest.approx(after[0].norm().item(), rel=1e-4)


@pytest.mark.parametrize("family", SOME)
def test_ranges_are_whole_periods_and_blocks_stand_in_the_chosen_one(family):
    base = make_base(family)
    found = suggest_loop(base, text=tokens(20))
    kinds = [row.kind for row in found.layers]
    ranges = [row.loop_layers for row in found.candidates]
    assert found.period == period_of(kinds)
    assert len(set(ranges)) == len(ranges)
    if family != "jet_nemotron":
        assert all(first % found.period == (end - first) % found.period == 0 for first, end in ranges)
    (chosen,) = (row for row in found.candidates if row.is_chosen)
    assert found.config.loop_layers == chosen.loop_layers
    assert bool(found.config.block_layers) == (family not in HYBRIDS)
    assert all(layer in range(*chosen.loop_layers) for layer in found.config.block_layers)
    SleepForCausalLM.from_base(base, dataclasses.replace(found.config, window_size=8))


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_a_model_that_sleeps_runs_with_its_blocks_and_keeps_them(family):
    model = make_model(family, sleep_config(family, sleep_passes=3))
    found = suggest_loop(model, text=tokens(20))
    with torch.no_grad(), model.sleeping(window_size=32):
        assert found.loss == pytest.approx(model(tokens(20)[None], labels=tokens(20)[None]).loss.item(), abs=1e-4)
    assert found.loss != pytest.approx(suggest_loop(make_base(family), text=tokens(20)).loss, abs=1e-3)
    assert dataclasses.replace(found.config, loop_layers=model.config.sleep.loop_layers) == model.config.sleep
    assert found.config != model.config.sleep or found.config.loop_layers == (0, 4)


def test_a_model_of_one_layer_loops_it():
    config = AutoConfig.for_model("llama", vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=1)
    base = AutoModelForCausalLM.from_config(config)
    found = suggest_loop(base, text=tokens(9))
    assert [row.loop_layers for row in found.candidates] == [(0, 1)]
    assert (found.config.loop_layers, found.config.block_layers) == ((0, 1), (0,))


def test_a_model_in_bfloat16_is_measured_and_left_as_it_was():
    model = make_base("llama", torch.bfloat16).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = suggest_loop(model, text=tokens(20))
    assert found.loss == pytest.approx(suggest_loop(make_base("llama"), text=tokens(20)).loss, abs=0.1)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_no_more_than_so_many_tokens_are_read():
    assert suggest_loop(make_base("llama"), text=tokens(MAX_TOKENS + 9)).tokens == MAX_TOKENS


def test_a_sink_is_born_and_dies_where_its_share_jumps():
    assert _sink_change(1, SINK) == "born"
    assert _sink_change(SINK, SINK / SINK_STEP) == "dies"
    assert _sink_change(SINK, SINK * SINK_STEP * 0.9) == ""
    assert _sink_change(1, SINK * 0.9) == ""


@pytest.mark.parametrize(
    ("losses", "holding", "chosen"),
    [
        pytest.param({(0, 9): 0.2, (2, 6): 0.1}, {}, (0, 9), id="the longest"),
        pytest.param({(0, 9): 4.0, (2, 6): 0.2, (3, 7): 0.1}, {}, (3, 7), id="of equally long ones the cheapest"),
        pytest.param({(0, 9): 4.0, (2, 6): 0.1, (3, 5): 0.2}, {(2, 6)}, (3, 5), id="no sink is born in it"),
        pytest.param({(0, 9): 0.1, (3, 5): 0.1}, {(0, 9)}, (0, 9), id="all layers may hold a sink"),
        pytest.param({(0, 9): 4.0, (2, 6): 0.9, (3, 5): 0.8}, {}, (3, 5), id="the cheapest where none is cheap"),
    ],
)
def test_the_rule_of_choice(losses, holding, chosen):
    assert _choice(losses, {loop: loop in holding for loop in losses}, 9) == chosen


@pytest.mark.parametrize(
    ("text", "message"), [(tokens(2), "text has 2 tokens, and at least 3"), ("a text", "pass its tokenizer")]
)
def test_what_cannot_be_measured_says_so(text, message):
    with pytest.raises(ValueError, match=message):
        suggest_loop(make_base("llama"), text=text)


# The command.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "c": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path / "model")
    make_base("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("a b c b a c c " * 3, encoding="utf-8")
    return tmp_path


def test_the_command_prints_tables_json_and_a_plot(folder: Path):
    arguments = ("suggest-loop", str(folder / "model"), "--text", str(folder / "text.txt"))
    shown = run(*arguments)
    assert shown.exit_code == 0, shown.output
    assert "21 tokens" in shown.stdout
    result = run(*arguments, "--json", "--plot", str(folder / "loop.png"))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    ids = torch.tensor([1, 2, 3, 2, 1, 3, 3] * 3)
    assert found["loss"] == pytest.approx(suggest_loop(make_base("llama"), text=ids).loss, abs=1e-4)
    assert (folder / "loop.png").read_bytes().startswith(b"\x89PNG")
    sleep = SleepConfig.from_dict(found["config"])
    assert f"SleepConfig(loop_layers={sleep.loop_layers}, block_layers={sleep.block_layers})" in shown.stdout
    chosen = [row["loop_layers"] for row in found["candidates"] if row["is_chosen"]]
    assert chosen == [list(sleep.loop_layers)]
    assert len(found["layers"]) == 4


def test_the_command_reads_a_sleep_checkpoint(folder: Path):
    make_model("llama", sleep_config("llama")).save_pretrained(folder / "model")
    result = run("suggest-loop", str(folder / "model"), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["config"]["block_layers"] == [0, 2]
    make_model("llama", sleep_config("llama")).save_pretrained(folder / "bare")
    result = run("suggest-loop", str(folder / "bare"))
    assert "holds no tokenizer that loads: pass --tokenizer" in result.stderr
    again = run("suggest-loop", str(folder / "bare"), "--tokenizer", str(folder / "model"), "--json")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["./nowhere"], "there is no folder ./nowhere"), (["model", "--text", "nowhere.txt"], "nowhere.txt")],
)
def test_the_command_s_errors_are_one_line(folder: Path, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    result = run("suggest-loop", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
