"""The recipe on managers, and what compares and measures trained models: answers, paired tests, retention."""

import json
from importlib import import_module
from itertools import product
from math import comb
from pathlib import Path

import pytest
import torch
from helpers import save_tiny_llama
from test_data_managers import NAMES, byte_level, fast
from transformers import LlamaForCausalLM

from hf_sleep import AutoModelForSleepLM, SleepForCausalLM
from hf_sleep.data import GSMInfinite, KHop, Managers
from hf_sleep.eval import answers
from hf_sleep.training import GenerationEvaluation, SleepTrainer, SleepTrainingArguments

ROOT = Path(__file__).parents[1]
QUICK = "--people 5 --hops 1 2 --windows 2 --questions 2 --window-size 60 --steps 2 --batch-size 4 --eval-problems 6"


@pytest.fixture
def recipe(monkeypatch):
    """Imports a recipe by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    return import_module


@pytest.fixture(scope="module")
def tokenizer():
    return fast(byte_level(1500, NAMES))


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """A folder with a tiny llama and its tokenizer."""
    return save_tiny_llama(tmp_path_factory.mktemp("base"), tokenizer)


def awake(model):
    """The model, with blocks that write something."""
    torch.manual_seed(3)
    for block in model.fast_weights.values():
        torch.nn.init.normal_(block.mixer.o_proj.weight, std=0.5)
    return model.eval()


def test_a_base_is_fine_tuned_on_managers_and_two_runs_are_compared(recipe, base, tmp_path, capsys):
    main = recipe("finetune_managers").main
    for n in ("1", "2"):
        options = [*QUICK.split(), "--model", base, "--sleep-passes", n, "--eval-passes", "1", "2"]
        results = main([*options, "--output", str(tmp_path / n)])
        assert results == json.loads((tmp_path / n / "results.json").read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    for line in ("before, N = 1", "after, N = 2", "after, last window alone", "after, full context", "chance"):
        assert f"| {line} |" in printed
    for scores in (results["before"], results["after"]):
        assert {(s["reads"], s["N"]) for s in scores} == {("all", 1), ("all", 2), ("last_window", 2), ("full", 2)}
        assert sum(score["n"] for score in scores) == 4 * 6 * 2
        assert all(score["chance"] == 1 / 4 and len(score["right"]) == score["n"] for score in scores)
    assert "| Managers | 1 | 2 |" in (tmp_path / "2" / "model" / "README.md").read_text(encoding="utf-8")

    compare = recipe("compare_runs").main
    rows = compare([str(tmp_path / "1"), str(tmp_path / "2")])
    assert [row["difficulty"] for row in rows] == [1, 2, "all"]
    assert rows[-1]["n"] == 12
    assert "| difficulty | n | A | B | only A | only B | p |" in capsys.readouterr().out
    same = compare([str(tmp_path / "1"), str(tmp_path / "1"), "--reads", "full", "full"])
    assert all((row["only_a"], row["only_b"], row["p"]) == (0, 0, 1.0) for row in same)
    with pytest.raises(SystemExit, match=r"no answers for reads=all, N=3: it has \[\('all', 1\), \('all', 2\)"):
        compare([str(tmp_path / "1"), str(tmp_path / "2"), "--sleep-passes", "3"])
    with pytest.raises(SystemExit, match="2"):
        compare([str(tmp_path / "1"), str(tmp_path / "2"), "--reads", "all", "all", "full"])
    main([*options, "--questions", "1", "--output", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="were asked other problems"):
        compare([str(tmp_path / "1"), str(tmp_path / "other")])


def test_how_to_sleep_can_be_said(recipe, base, tmp_path):
    sleep = "--loop-layers 0 1 --block-layers 0 --between gate --decay-once --window-size 60"
    parse, shared = recipe("finetune_gsm").parse_arguments, recipe("shared.finetuning")
    model = shared.load(parse(["--model", base, *sleep.split()]))
    config = model.config.sleep
    assert (config.loop_layers, config.block_layers, config.between, config.decay_once) == ((0, 1), (0,), "gate", True)
    assert all(parameter.requires_grad for parameter in model.between.parameters())
    model.save_pretrained(tmp_path)
    assert shared.load(parse(["--model", str(tmp_path)])).config.sleep.decay_once
    for given, decays_once in (([], True), (["--no-decay-once"], False), (["--decay-once", "false"], False)):
        options = parse(["--model", str(tmp_path), *given])
        shared.complete(options)
        assert options.decay_once == shared.load(options).config.sleep.decay_once == decays_once


@pytest.mark.parametrize("seed", [0, 1])
def test_answers_are_judged_as_generation_would(recipe, base, tokenizer, seed):
    task = GSMInfinite(tokenizer, ops=(1, 2), tokens=(0, 0))
    model = awake(AutoModelForSleepLM.from_pretrained(base, sleep={"window_size": 40, "num_blocks": 2}))
    rows = []
    for row in task.rows(seed, "test", range(12)):
        # Half of the answers are what the model itself would say.
        prompt = row["input_ids"][: answers.first_answer(row)]
        said = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False)[0].tolist()
        own = {"input_ids": said, "labels": [-100] * len(prompt) + said[len(prompt) :]}
        rows.append(row | own if len(rows) % 2 else row)
    judged = [answer for row in answers.judge(model, task, rows, 5) for answer in row]
    trainer = SleepTrainer(model, SleepTrainingArguments(output_dir="unused", use_cpu=True, report_to="none"))
    generation = GenerationEvaluation(trainer, rows, (2,), 5)
    texts = generation._generate(model, generation.rows, 2)
    right = [said[: len(answer)] == answer for (_, _, answer), said in zip(generation.rows, texts, strict=True)]
    assert [hit for _, hit in judged] == right
    assert right.count(True) >= 6


def test_full_context_is_the_base_and_the_last_window_is_alone(recipe, base, tokenizer):
    task = Managers(tokenizer, people=5, windows=2, questions=3, window_size=60)
    rows = task.rows(0, "test", range(4))
    lm, model = LlamaForCausalLM.from_pretrained(base).eval(), AutoModelForSleepLM.from_pretrained(base).eval()
    ends = [answers.last_window(row, 60) for row in rows]
    for row, end in zip(rows, ends, strict=True):
        start = max(i for i, sleeps in enumerate(row["sleep_after"]) if sleeps) + 1
        for name in ("input_ids", "labels", "sleep_after"):
            assert end[name] == row[name][start:]
    for some in (rows, ends):
        expected = [task.score(lm(torch.tensor([r["input_ids"]])).logits[0].argmax(-1).tolist(), r) for r in some]
        with model.sleeping(window_size=500):
            assert answers.judge(model, task, [answers.without_sleep(row) for row in some], 3) == expected
    asked = {"input_ids": list(range(10)), "labels": [-100] * 8 + [1, 2]}
    for size, left in ((3, [6, 7, 8, 9]), (4, [4, 5, 6, 7, 8, 9]), (8, list(range(10))), (7, [7, 8, 9])):
        assert answers.last_window(asked, size)["input_ids"] == left


def test_rows_sleep_where_they_say(recipe, base, tokenizer):
    task = Managers(tokenizer, people=5, windows=3, questions=2, window_size=60)
    rows = task.rows(0, "test", range(3))
    model, slept = AutoModelForSleepLM.from_pretrained(base, sleep={"window_size": 60}).eval(), []
    with model.on_sleep(slept.append):
        answers.judge(model, task, rows, 3)
    for b, row in enumerate(rows):
        ends = [i + 1 for i, sleeps in enumerate(row["sleep_after"]) if sleeps]
        assert [sleep.tokens for sleep in slept if sleep.row == b] == ends
    with model.on_sleep(slept.append):
        answers.judge(model, task, [answers.last_window(row, 60) for row in rows], 3)
    assert len(slept) == 3 * 3
    arguments = SleepTrainingArguments(output_dir="unused", max_steps=1, use_cpu=True, report_to="none")
    trainer = SleepTrainer(model, arguments, train_dataset=task.stream(), task=task)
    assert next(iter(trainer.get_train_dataloader()))["sleep_after"].sum(1).tolist() == [3] * 8


def test_the_last_window_is_what_hard_eviction_leaves(base, tokenizer):
    rows = GSMInfinite(tokenizer, ops=(1, 2), tokens=(0, 0)).dataset(20)
    model = AutoModelForSleepLM.from_pretrained(base, sleep={"window_size": 40}).eval()
    for row in rows:
        end = answers.last_window(row, 40)
        prompts = [each["input_ids"][: answers.first_answer(each)] for each in (row, end)]
        assert prompts[0][-len(prompts[1]) :] == prompts[1]
        assert len(prompts[1]) <= 40
        with torch.no_grad():
            logits = [model(torch.tensor([ids])).logits[0, -1] for ids in prompts]
        torch.testing.assert_close(*logits)


def test_mcnemar_is_exact(recipe):
    mcnemar = recipe("compare_runs").mcnemar
    for only_a, only_b in product(range(7), range(7)):
        total = only_a + only_b
        chances = [comb(total, i) / 2**total for i in range(total + 1)]
        as_far = [c for i, c in enumerate(chances) if abs(2 * i - total) >= abs(only_a - only_b)]
        assert mcnemar(only_a, only_b) == pytest.approx(min(1.0, sum(as_far)))
    assert recipe("compare_runs").discordant("1100", "1010") == (1, 1)


def test_retention_asks_about_the_first_cycle(recipe, tmp_path, capsys):
    retention, task = recipe("retention"), KHop(num_nodes=5, hops=(1, 3), windows=2, cycles=3)
    rows = task.rows(1, "test", range(40))
    cycle, others = retention.split(task, rows)
    assert (cycle.shape, others.shape) == ((40, 2 * 7), (40, 4 * 7))
    about = [i for i, row in enumerate(rows) if row["answer"] and row["input_ids"][-2] < task.node_token + 5]
    assert about
    for i in about:
        which = task.hops.index(rows[i]["difficulty"])
        ids, answers = (t[i].tolist() for t in retention.questions(task, cycle, which))
        said = dict(zip(ids[1:-1], answers, strict=True))
        assert ids[0] == task.hop_token + which
        asked = rows[i]["input_ids"][-6:-1]
        assert [said[node] for node in asked] == [label for label in rows[i]["labels"] if label != -100]
    edges = retention.further_windows(task, "edges", 9, 40, seed=1)
    assert edges.shape == (40, 9, 7)
    assert int(edges.min()) >= 25
    assert (edges != task.fill_token).any(-1).all()
    assert (retention.further_windows(task, "fill", 3, 2, seed=1) == task.fill_token).all()

    model = recipe("shared.from_scratch").hybrid(task.vocab_size, task.window_size, 2, hidden_size=16)
    arguments = SleepTrainingArguments(tmp_path, use_cpu=True, report_to="none")
    SleepTrainer(model, arguments, task=task).save_model(tmp_path / "model")
    options = ["--further", "2", "0", "--sleep-passes", "1", "2", "--rows", "8", "--output", str(tmp_path / "run")]
    scores = retention.main([str(tmp_path / "model"), *options])
    assert scores == json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert [(s["N"], s["kind"], s["further"], s["k"]) for s in scores] == list(
        product((1, 2), ("fill", "edges"), (0, 2), (1, 3))
    )
    assert "| 2 | 2 of edges |" in capsys.readouterr().out


def test_retention_reads_as_the_model_would(recipe, tmp_path):
    """Without further windows it is the accuracy on rows; further windows of fill are windows of the model."""
    retention, task = recipe("retention"), KHop(8)
    model = SleepForCausalLM.from_pretrained(ROOT / "examples" / "khop" / "N3").eval()
    options = retention.Arguments(further=[0, 2], rows=16, seed=1)
    found = retention.retention(model, task, "fill", options)
    assert min(found[0, k] for k in (1, 2, 3)) > 0.9
    cycle, _ = retention.split(task, task.rows(1, "test", range(16)))
    ids, answers = retention.questions(task, cycle, 3)
    fill = torch.full((16, 2 * task.window_size), task.fill_token)
    said = model(torch.cat([cycle, fill, ids], dim=1)).logits[:, -9:-1].argmax(-1)
    assert (said == answers).float().mean().item() == found[2, 4]
    with pytest.raises(SystemExit, match=r"has no task\.json of k-hop"):
        retention.main([str(ROOT / "examples" / "khop" / "N3"), "--output", str(tmp_path)])
