"""The recipes that fine-tune on GSM-Infinite, run on tiny models."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import make_base
from helpers import save_tiny_llama
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_sleep import AutoModelForSleepLM, SleepConfig, SleepForCausalLM
from hf_sleep.cli import app
from hf_sleep.data import GSMInfinite
from hf_sleep.sleep import Sleeper

ROOT = Path(__file__).parents[1]
QUICK = ["--window-size", "40", "--ops", "1", "2", "--steps", "2", "--batch-size", "4", "--eval-problems", "8"]


@pytest.fixture
def recipe(monkeypatch):
    """Imports a recipe by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    return import_module


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = [GSMInfinite(tokens=(0, 0)).problem(seed).prompt for seed in range(300)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=["</s>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, eos_token="</s>")


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """A folder with a tiny llama and its tokenizer."""
    return save_tiny_llama(tmp_path_factory.mktemp("base"), tokenizer)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_text_is_read_through_sleep_and_the_base_stays(recipe, base, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(GSMInfinite(tokens=(0, 0)).problem(seed).prompt for seed in range(60)), encoding="utf-8")
    options = ["--model", base, "--text", str(text), "--window-size", "16", "--windows", "3", "--steps", "30"]
    recipe("finetune_text").main([*options, "--learning-rate", "0.03", "--output", str(tmp_path / "run")])
    before, after = map(float, re.search(r"perplexity: (\S+) before, (\S+) after 30", capsys.readouterr().out).groups())
    assert after < 0.9 * before
    model, lm = AutoModelForSleepLM.from_pretrained(tmp_path / "run"), LlamaForCausalLM.from_pretrained(base)
    assert (model.config.sleep.window_size, model.config.sleep.sleep_passes) == (16, 2)
    assert all(torch.equal(model.lm.get_parameter(name), parameter) for name, parameter in lm.named_parameters())
    trained = ["--model", str(tmp_path / "run"), *options[2:4], "--windows", "3", "--steps", "1", "--sleep-passes", "3"]
    recipe("finetune_text").main([*trained, "--output", str(tmp_path / "further")])
    further = AutoModelForSleepLM.from_pretrained(tmp_path / "further").config.sleep
    assert (further.window_size, further.sleep_passes, further.between) == (16, 3, "gate")
    recipe("finetune_text").main([*options[:-1], "1", "--whole-model", "--output", str(tmp_path / "whole")])
    assert AutoModelForSleepLM.from_pretrained(tmp_path / "whole").config.sleep.between == "none"
    with pytest.raises(SystemExit, match="20 samples of 3000 are needed"):
        recipe("finetune_text").main([*options, "--windows", "300", "--window-size", "10"])


def test_a_base_is_fine_tuned_evaluated_and_written_down(recipe, base, tmp_path, capsys):
    folder = tmp_path / "run"
    options = ["--model", base, *QUICK, "--eval-passes", "1", "2", "--output", str(folder)]
    results = recipe("finetune_gsm").main(options)
    assert results == json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for when in ("before", "after"):
        read = {(score["reads"], score["N"]) for score in results[when]}
        assert read == {("all", 1), ("all", 2), ("last_window", 2), ("full", 2)}
        assert sum(score["n"] for score in results[when]) == 2 * 2 * 8
        assert all(len(s["right"]) == s["n"] for s in results[when])
        assert all(s["accuracy"] == s["right"].count("1") / s["n"] for s in results[when])
        task = GSMInfinite(ops=(1, 2), tokens=(0, 0))
        assert all(score["chance"] == task.chance(score["difficulty"], score["mode"]) for score in results[when])
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["settings"]["window_size"] == 40
    assert [line["step"] for line in lines(folder) if "loss" in line] == [1, 2]
    assert (folder / "accuracy.png").stat().st_size > 5_000
    printed = capsys.readouterr().out
    lasts = ("before, full context", "after, last window alone", "after, full context", "chance")
    for line in ("before, N = 1", "before, N = 2", "after, N = 2", *lasts):
        assert f"| {line} |" in printed
    model = AutoModelForSleepLM.from_pretrained(folder / "model")
    assert (model.config.sleep.window_size, model.config.sleep.sleep_passes) == (40, 2)
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert "2 steps of 4 problems" in card
    assert "| GSM-Infinite | 1 | 2 |" in card
    with pytest.raises(SystemExit, match="holds a run already: choose another --output"):
        recipe("finetune_gsm").main(options)


def test_a_run_that_was_interrupted_goes_on_to_the_same_weights(recipe, base, tmp_path):
    folder = tmp_path / "run"
    options = ["--model", base, *QUICK, "--steps", "4", "--save-steps", "2", "--output", str(folder)]
    main = recipe("finetune_gsm").main
    whole = main(options)
    weights = load_file(folder / "model" / "model.safetensors")
    shutil.rmtree(folder / "model" / "checkpoint-4")
    (folder / "model" / "model.safetensors").unlink()
    (folder / "results.json").write_text(json.dumps({"before": whole["before"]}), encoding="utf-8")
    assert main([*options, "--resume"]) == whole
    assert len([line for line in lines(folder) if line["step"] == 0]) == 2
    again = load_file(folder / "model" / "model.safetensors")
    assert again.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(again[name], tensor), name
    assert [line["step"] for line in lines(folder) if "loss" in line] == [1, 2, 3, 4, 3, 4]


@pytest.mark.parametrize("stage", ["", "--whole-model --hard-warmup-steps 2 --eviction sliding"])
def test_a_run_in_parts_ends_as_one_in_one_piece(recipe, base, stage, tmp_path, capsys):
    main, whole, parts = recipe("finetune_gsm").main, tmp_path / "whole", tmp_path / "parts"
    options = ["--model", base, *QUICK, "--steps", "3", "--gradient-accumulation-steps", "2", *stage.split()]
    expected = main([*options, "--output", str(whole)])
    options += ["--resume", "--output", str(parts)]
    for step in (1, 2, 3):
        assert main([*options, "--minutes", "0"]) == {}
        assert (
            f"stopped at step {step} of 3, after 0 minutes: the same command with --resume" in capsys.readouterr().out
        )
    assert not (parts / "results.json").exists()
    assert {line["step"] for line in lines(parts) if "eval_loss" in line} == {0}
    assert main([*options, "--minutes", "1e6"]) == expected
    assert [line["loss"] for line in lines(parts) if "loss" in line] == [
        line["loss"] for line in lines(whole) if "loss" in line
    ]
    weights, again = (load_file(folder / "model" / "model.safetensors") for folder in (whole, parts))
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("stage", ["--no-whole-model", "--whole-model --hard-warmup-steps 2 --eviction sliding"])
def test_what_is_not_to_be_trained_stays(recipe, base, stage, tmp_path):
    options = ["--model", base, *QUICK, "--learning-rate", "0.1", *stage.split(), "--output", str(tmp_path)]
    recipe("finetune_gsm").main(options)
    before = SleepForCausalLM.from_base(LlamaForCausalLM.from_pretrained(base), SleepConfig(window_size=40))
    before, after = before.state_dict(), load_file(tmp_path / "model" / "model.safetensors")
    after = {name: after[name] for name in before if name in after}
    theirs = [name for name in after if "fast_weights" not in name]
    assert theirs
    assert all(torch.equal(after[name], before[name]) for name in theirs)
    outputs = [tensor for name, tensor in after.items() if name.endswith("mixer.o_proj.weight")]
    assert outputs
    assert all(tensor.abs().sum() > 0 for tensor in outputs)


def test_the_seed_is_of_a_retrofits_blocks_and_a_checkpoint_keeps_its_own(recipe, base, tmp_path):
    def load(seed, source):
        options = recipe("finetune_gsm").parse_arguments(
            ["--model", str(source), "--output", str(tmp_path / "run"), "--window-size", "40"]
        )
        torch.manual_seed(seed)
        return recipe("shared.finetuning").load(options)

    first, again, other = (load(seed, base).fast_weights.state_dict() for seed in (1, 1, 2))
    drawn = [name for name in first if name.endswith("proj.weight") and "o_proj" not in name]
    assert drawn
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    load(1, base).save_pretrained(tmp_path / "asleep")
    kept = load(2, tmp_path / "asleep").fast_weights.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in first.items())


def test_two_processes_train_as_one_and_write_once(recipe, base, tmp_path):
    options = ["--model", base, *QUICK, "--no-bf16", "--whole-model", "--muon-learning-rate", "0"]
    recipe("finetune_gsm").main([*options, "--output", str(tmp_path / "one")])
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", "recipes/accelerate/cpu.yaml", "--main_process_port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command += ["recipes/finetune_gsm.py", *options, "--batch-size", "2", "--output", str(tmp_path / "two")]
    for more in (["--minutes", "0"], ["--resume"]):
        done = subprocess.run([*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("stopped at step") == more.count("--minutes")
    assert done.stdout.count("| chance |") == 1
    one, two = ([line for line in lines(tmp_path / name) if "loss" in line] for name in ("one", "two"))
    assert [line["step"] for line in two] == [1, 2]
    for name in ("loss", "grad_norm", "num_input_tokens_seen"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-4), name
    results = [json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8")) for name in ("one", "two")]
    assert results[0] == results[1]
    assert "2 steps of 4 problems" in (tmp_path / "two" / "model" / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_recipe_pushes_what_it_trained(recipe, base, hub, tmp_path):
    options = ["--model", base, *QUICK, "--push-to-hub", "me/gsm", "--output", str(tmp_path / "run")]
    recipe("finetune_gsm").main(options)
    model = AutoModelForSleepLM.from_pretrained("me/gsm")
    here = load_file(tmp_path / "run" / "model" / "model.safetensors")
    there = model.state_dict()
    assert all(torch.equal(there[name], tensor) for name, tensor in here.items())
    assert len(hub.messages) == 2  # the empty repository, and the model
    assert {"tokenizer.json", "modeling_hf_sleep.py"} < hub.files("me/gsm").keys()
    assert hub.card("me/gsm").data.eval_results[0].dataset_name == "GSM-Infinite"


def test_a_checkpoint_sleeps_as_it_was_trained_where_nothing_else_is_said(recipe, base, tmp_path, monkeypatch):
    model = AutoModelForSleepLM.from_pretrained(
        base, sleep={"window_size": 30, "sleep_passes": 3, "num_sink_tokens": 2}
    )
    model.save_pretrained(tmp_path / "asleep")
    PreTrainedTokenizerFast.from_pretrained(base).save_pretrained(tmp_path / "asleep")
    slept = []
    sleep = Sleeper.sleep
    monkeypatch.setattr(
        Sleeper, "sleep", lambda self, memory, rows, policy: slept.extend(rows) or sleep(self, memory, rows, policy)
    )
    settings = ["--task-settings", '{"ops": [1, 2], "tokens": [0, 0]}', "--problems", "4", "--json"]
    said = CliRunner().invoke(app, ["eval", str(tmp_path / "asleep"), "gsm_infinite", *settings])
    found = json.loads(said.stdout)
    assert (found["sleep"]["window_size"], found["N"]) == (30, [3])
    assert slept
    options = recipe("finetune_gsm").parse_arguments(["--model", str(tmp_path / "asleep"), "--sleep-passes", "2"])
    recipe("finetune_gsm").complete(options)
    assert (options.window_size, options.sleep_passes, options.num_sink_tokens) == (30, 2, 2)
    options = recipe("finetune_gsm").parse_arguments(["--model", base])
    recipe("finetune_gsm").complete(options)
    assert (options.window_size, options.sleep_passes, options.eviction) == (64, 2, "hard")


def test_a_hybrid_trains_its_own_layers_on_a_text(recipe, tokenizer, tmp_path):
    base = make_base("qwen3_5")
    base.resize_token_embeddings(len(tokenizer))
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(GSMInfinite(tokens=(0, 0)).problem(seed).prompt for seed in range(40)), encoding="utf-8")
    options = ["--model", str(tmp_path / "base"), "--text", str(text), "--window-size", "16", "--windows", "2"]
    recipe("finetune_text").main([*options, "--steps", "2", "--output", str(tmp_path / "run")])
    trained = AutoModelForSleepLM.from_pretrained(tmp_path / "run").lm.state_dict()
    changed = {name for name, tensor in base.state_dict().items() if not torch.equal(trained[name], tensor)}
    assert changed
    assert all("linear_attn" in name for name in changed)


@pytest.mark.parametrize("preset", ["small", "smollm2", "paper-ouro"])
def test_autocast_is_for_machines_that_have_bfloat16(preset, recipe, monkeypatch):
    module = recipe("finetune_gsm")
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(recipe("shared.finetuning"), "default_dtype", lambda: dtype)  # noqa: B023
        assert module.parse_arguments(["--preset", preset]).bf16 == (dtype == torch.bfloat16)
        assert module.parse_arguments(["--preset", preset, "--bf16"]).bf16
        assert not module.parse_arguments(["--preset", preset, "--no-bf16"]).bf16


def test_the_presets_are_the_papers(recipe, tokenizer, monkeypatch):
    monkeypatch.setattr(recipe("shared.finetuning"), "default_dtype", lambda: torch.bfloat16)
    parse = recipe("finetune_gsm").parse_arguments
    presets = {name: parse(["--preset", name]) for name in ("paper-jet-nemotron", "paper-ouro", "paper-ouro-sliding")}
    for options in presets.values():
        assert options.batch_size * options.gradient_accumulation_steps == 256
        assert (options.muon_learning_rate, options.learning_rate) == (1e-3, 5e-5)
        assert (options.eval_problems, options.whole_model, options.checkpointing, options.bf16) == (
            1600,
            True,
            True,
            True,
        )
        assert (options.ops, options.tokens, options.block_half_lives) == ([1, 8], [2000, 3300], [0, 0])
        assert len(GSMInfinite(tokenizer, window_size=options.window_size).example(0)["input_ids"]) >= 2000
    jet, ouro, sliding = presets.values()
    assert (jet.window_size, jet.sleep_passes, jet.loop_layers, jet.eviction) == (2000, 6, [7, 21], "hard")
    assert (ouro.window_size, ouro.sleep_passes, ouro.eviction, ouro.hard_warmup_steps) == (2000, 4, "hard", 0)
    assert (sliding.window_size, sliding.sleep_passes, sliding.eviction) == (512, 4, "sliding")
    assert 3 * sliding.hard_warmup_steps == sliding.steps
    published = SimpleNamespace(
        model_type="ouro",
        num_hidden_layers=24,
        hidden_size=2048,
        num_attention_heads=16,
        max_position_embeddings=65536,
    )
    seen, stand_in = {}, SimpleNamespace(config=SimpleNamespace(base_model_name_or_path=None))
    monkeypatch.setattr(
        AutoModelForSleepLM, "from_pretrained", lambda name, sleep, dtype: seen.update(sleep) or stand_in
    )
    recipe("shared.finetuning").load(sliding)
    sleep = SleepConfig(**seen).resolve(published)
    assert (sleep.num_blocks, sleep.block_num_heads, sleep.block_head_dim) == (6, 12, 96)
    assert sleep.block_half_lives is None
    recipe("shared.finetuning").load(parse(["--whole-model", "--block-half-lives", "0.5", "8"]))
    assert SleepConfig(**seen).block_half_lives == (0.5, 8.0)
    for preset in ("small", "smollm2", "smollm2-sliding"):
        options = parse(["--preset", preset])
        assert options.block_half_lives is None
        assert options.between == ("none" if options.whole_model else None)  # a gate is in the way of what is trained
    assert parse(["--preset", "paper-ouro", "--steps", "7", "--no-bf16"]).steps == 7
    assert not parse(["--preset", "paper-ouro", "--no-bf16"]).bf16
    assert parse([]).model == ".demo/SmolLM2-135M-Instruct"
