"""`hf-sleep eval`: a checkpoint's own task, any base on any task, text by position, and the tests by their names."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from families import make_model, sleep_config
from helpers import save_tiny_llama
from test_data_managers import NAMES, byte_level, fast
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM
from transformers.utils import logging
from typer.testing import CliRunner

from hf_sleep import AutoModelForSleepLM
from hf_sleep.cli import app
from hf_sleep.cli.evaluate import Asked, _text_rows, _tokens
from hf_sleep.data import GSMInfinite, KHop
from hf_sleep.data.words import start_of
from hf_sleep.eval import answers, forgetting, loss_by_position
from hf_sleep.eval.report import by_difficulty
from hf_sleep.eval.suite import PAIRS, TESTS
from hf_sleep.training import SleepTrainer, SleepTrainingArguments

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _verbosity():
    """The command silences transformers' warnings in its process, which here is pytest's."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="module")
def tokenizer():
    return fast(byte_level(1500, NAMES))


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """A folder with a tiny llama and its tokenizer."""
    return save_tiny_llama(tmp_path_factory.mktemp("base"), tokenizer)


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def evaluate(*arguments):
    """What it found: scores of each result, of the only one without a list around them; and what it said."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["results"]
    return (found[0] if len(found) == 1 else found), result.stderr


def asleep(scores):
    return [score for score in scores if score["reads"] == "all"]


def test_a_trained_checkpoint_is_evaluated_at_every_n_and_l(tmp_path):
    model, options = ROOT / "examples" / "khop" / "N3", ["--passes", "1,3", "--problems", "96", "--batch-size", "32"]
    accuracy = {}
    for size in (7, 10):
        found, said = evaluate(model, "khop", "--window-size", size, *options, "--output", tmp_path / str(size))
        assert ("Note: khop: its text comes in windows of 10 tokens" in said) is (size != 10)
        assert found == json.loads((tmp_path / str(size) / "eval.json").read_text(encoding="utf-8"))["results"][0]
        scores = asleep(found["scores"])
        assert all(score["chance"] == KHop(8).chance(score["difficulty"]) for score in scores)
        accuracy |= {(size, score["N"], score["difficulty"]): score["accuracy"] for score in scores}
        for n in (1, 3):
            assert sum(score["n"] for score in scores if score["N"] == n) == 96 * 8
    assert accuracy.keys() == {(size, n, k) for size in (7, 10) for n in (1, 3) for k in (1, 2, 3, 4)}
    assert min(accuracy[10, 3, k] for k in (1, 2, 3, 4)) > 0.8
    assert accuracy[10, 3, 3] > accuracy[10, 1, 3] + 0.2
    assert accuracy[10, 3, 3] > accuracy[7, 3, 3] + 0.2
    assert (tmp_path / "10" / "khop.png").stat().st_size > 5_000
    page = (tmp_path / "10" / "eval.md").read_text(encoding="utf-8")
    for line in ("## khop", "| N = 1 |", "| N = 3 |", "| last window alone |", "| full context |", "| chance |"):
        assert line in page


def test_a_checkpoint_carries_its_task(tmp_path):
    task = KHop(num_nodes=5, hops=(1, 2), num_queries=3)
    model = make_model("llama", sleep_config("llama", window_size=task.window_size, sleep_passes=2))
    arguments = SleepTrainingArguments(tmp_path, use_cpu=True, report_to="none")
    SleepTrainer(model, arguments, task=task).save_model(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "task.json").read_text(encoding="utf-8")) == {
        "task": "KHop", "num_nodes": 5, "hops": [1, 2], "num_queries": 3, "windows": 1, "cycles": 1
    }  # fmt: skip
    options = [tmp_path / "model", "--problems", "4"]
    found, said = evaluate(*options, "khop")
    asked = Counter(k for row in task.dataset(4, seed=1, split="test") for k, _ in task.answers(row))
    assert [(score["difficulty"], score["n"]) for score in asleep(found["scores"])] == sorted(asked.items())
    assert "the checkpoint was trained" not in said
    found, said = evaluate(*options, "khop", "--task-settings", '{"hops": [1]}')
    assert {score["difficulty"] for score in found["scores"]} == {1}
    assert "trained with hops=[1, 2], and is evaluated with [1]" in said
    assert "trained on KHop, and is evaluated on Rule110" in evaluate(*options, "rule110")[1]
    result = run(*options, "khop", "--task-settings", '{"num_nodes": 80}')
    assert result.exit_code == 1
    assert "KHop(num_nodes=80" in result.stderr
    assert "and the model knows 61" in result.stderr


def test_a_base_with_room_for_everything_is_the_base(base, tokenizer):
    settings = {"ops": [1, 2], "tokens": [0, 0], "modes": ["reverse"]}
    options = ["--task-settings", json.dumps(settings), "--problems", "6"]
    task = GSMInfinite(tokenizer, ops=(1, 2), tokens=(0, 0), modes=("reverse",))
    rows, lm = task.rows(1, "test", range(6)), LlamaForCausalLM.from_pretrained(base).eval()
    expected = Counter()
    for row in rows:
        said = lm(torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
        expected.update(level for level, right in task.score(said, row) if right)
    for size in (512, 30):
        found, _ = evaluate(base, "gsm_infinite", "--window-size", size, *options)
        scores = [score for score in found["scores"] if score["reads"] == ("all" if size == 512 else "full")]
        assert {(score["mode"], score["difficulty"]) for score in scores} == {
            ("reverse", row["difficulty"]) for row in rows
        }
        assert {s["difficulty"]: s["right"].count("1") for s in scores} == {
            level: expected[level] for level in {row["difficulty"] for row in rows}
        }
    result = run(base, "gsm_infinite", "--task-settings", '{"depth": 2}')
    assert result.exit_code == 1
    assert "GSMInfinite has no field depth" in result.stderr


def test_answers_are_counted_by_mode_and_operations(base, tokenizer, monkeypatch):
    right, reads = (
        {"all": (("forward", 1), ("reverse", 2)), "last_window": (("reverse", 2),)},
        iter(("all", "last_window")),
    )

    def judge(model, task, rows, batch_size):
        good = right.get(next(reads, ""), ())
        return [[(row["difficulty"], (row["mode"], row["difficulty"]) in good)] for row in rows]

    monkeypatch.setattr(answers, "judge", judge)
    settings = ["--task-settings", '{"ops": [1, 2], "tokens": [0, 0]}', "--problems", "40"]
    found, _ = evaluate(base, "gsm_infinite", *settings)
    for name in ("all", "last_window"):
        mine = [score for score in found["scores"] if score["reads"] == name]
        assert len(mine) == 4
        assert all(s["accuracy"] == float((s["mode"], s["difficulty"]) in right[name]) for s in mine)
    scores = asleep(found["scores"])
    count = {(score["mode"], score["difficulty"]): score["n"] for score in scores}
    rows = GSMInfinite(tokenizer, ops=(1, 2), tokens=(0, 0)).dataset(40, seed=1, split="test")
    assert count == Counter((row["mode"], row["difficulty"]) for row in rows)
    assert [score["accuracy"] for score in by_difficulty(found["scores"], "last_window")] == [
        0,
        pytest.approx(count["reverse", 2] / (count["reverse", 2] + count["forward", 2])),
    ]
    one, two = by_difficulty(scores)
    assert (one["n"], two["n"]) == (count["forward", 1] + count["reverse", 1], 40 - one["n"])
    assert one["accuracy"] == pytest.approx(count["forward", 1] / one["n"])
    assert two["accuracy"] == pytest.approx(count["reverse", 2] / two["n"])
    low, high = sorted({score["chance"] for score in scores if score["difficulty"] == 1})
    assert low < one["chance"] < high


def test_a_checkpoint_is_evaluated_on_managers(base):
    settings = {"people": 5, "hops": [1, 2], "questions": 2}
    options = ["--task-settings", json.dumps(settings), "--window-size", "60", "--problems", "5"]
    scores = asleep(evaluate(base, "managers", *options)[0]["scores"])
    assert {(score["difficulty"], score["chance"]) for score in scores} == {(1, 1 / 4), (2, 1 / 4)}
    assert sum(score["n"] for score in scores) == 5 * 2


def test_text_is_read_by_position(base, tokenizer, tmp_path):
    (tmp_path / "text.md").write_text(GSMInfinite(tokens=(0, 0)).problem(1).prompt * 20, encoding="utf-8")
    options = ["--window-size", "16", "--windows", "2,3", "--problems", "5", "--text", tmp_path / "text.md"]
    found, _ = evaluate(base, "position", "--passes", "1,2", *options, "--output", tmp_path / "out")
    assert (found["rows"], found["tokens"], found["window_size"]) == (5, 48, 16)
    text = (tmp_path / "text.md").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text).input_ids[: 5 * 48]).view(5, 48)
    model = AutoModelForSleepLM.from_pretrained(base, sleep={"window_size": 16}).eval()
    assert found["reads"] == loss_by_position(model, ids, (1, 2), 4).to_dict()["reads"]
    page = (tmp_path / "out" / "eval.md").read_text(encoding="utf-8")
    assert "|  | first window | other windows | recovered (95 %) | by memory (95 %) |" in page
    assert (tmp_path / "out" / "position-3-windows.png").stat().st_size > 5_000
    result = run(base, "position", "--window-size", "16", "--windows", "9999")
    assert result.exit_code == 1
    assert "give more --text, or fewer --windows" in result.stderr


def test_forgetting_is_measured_over_windows_of_other_text(base, tokenizer, tmp_path):
    (tmp_path / "text.md").write_text(GSMInfinite(tokens=(0, 0)).problem(1).prompt * 20, encoding="utf-8")
    options = ["--window-size", "16", "--windows", "1,4", "--problems", "5", "--text", tmp_path / "text.md"]
    found, _ = evaluate(base, "forgetting", "--passes", "2", *options, "--output", tmp_path / "out")
    ids = torch.tensor(tokenizer((tmp_path / "text.md").read_text(encoding="utf-8")).input_ids)
    model = AutoModelForSleepLM.from_pretrained(base, sleep={"window_size": 16}).eval()
    expected = forgetting(model, ids, (1, 4), texts=5, sleep_passes=2, batch_size=4).to_dict()
    assert {name: found[name] for name in expected} == expected
    assert "| windows in between | 0 | 1 | 4 |" in (tmp_path / "out" / "eval.md").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "forgetting-N-2.png").stat().st_size > 5_000
    result = run(base, "forgetting", "--window-size", "16", "--windows", "9999")
    assert result.exit_code == 1
    assert "Left out: forgetting: the text has" in result.stderr


@pytest.mark.parametrize("test", TESTS)
def test_every_test_runs(base, test, tmp_path):
    options = ["--window-size", "256", "--windows", "4", "--problems", "2", "--output", tmp_path]
    found, _ = evaluate(base, test, *options)
    assert {score["reads"] for score in found["scores"]} == {"all", "last_window", "full", "same_bytes"}
    assert all(0 <= score["chance"] < 1 and score["n"] for score in found["scores"])
    assert found["problems"]
    if test == "mqar":
        assert {score["difficulty"] for score in found["scores"]} == set(PAIRS)


def test_what_cannot_be_asked_is_said(base):
    result = run(base, "nonsense")
    assert result.exit_code == 1
    assert "nonsense is no test: there are position, forgetting, niah_single_1" in result.stderr
    result = run(base, "khop", "--task-settings", "[1]")
    assert "--task-settings [1]: it must be a JSON object" in result.stderr
    for option, said in (
        (("--windows", "0"), "--windows 0: each must be at least 1"),
        (("--passes", "1,0"), "--passes 1,0: each must be at least 1"),
        (("position", "--windows", "1"), "--windows 1: nothing leaves a window of position"),
        (("khop", "--task-settings", '{"window_size": 9}'), "give window_size as --window-size"),
    ):
        result = run(base, *option)
        assert (result.exit_code, said in result.stderr) == (1, True), result.output
    result = run(base, "niah_single_2", "cwe", "--window-size", "8", "--problems", "1")
    assert result.exit_code == 1
    assert "Left out: niah_single_2, 4 windows: " in result.stderr
    assert "Left out: cwe, 4 windows: " in result.stderr
    assert "nothing was measured" in result.stderr


def test_rows_of_text_begin_as_the_tokenizer_lets_a_text_begin(base, tokenizer):
    begun = fast(byte_level(1500, NAMES))
    begun.bos_token = begun.convert_ids_to_tokens(7)
    special = [("B", 7), ("E", begun.eos_token_id)]
    begun._tokenizer.post_processor = TemplateProcessing(single="B:0 $A E:0", special_tokens=special)
    assert start_of(begun) == [7]
    assert start_of(tokenizer) == []
    asked = Asked("tiny", AutoModelForSleepLM.from_pretrained(base, sleep={"window_size": 16}), begun, (1,), 4, 3, 0)
    rows = _text_rows(asked, None, 2)
    assert rows.shape == (3, 32)
    assert rows[:, 0].tolist() == [7] * 3
    assert 7 not in rows[:, 1:]
    assert torch.equal(rows[:, 1:].flatten(), _tokens(asked, None)[: 3 * 31])


def test_without_matplotlib_all_is_measured_and_nothing_drawn(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = ["--window-size", "256", "--problems", "1", "--output", tmp_path]
    found, said = evaluate(base, "mqar", "niah_single_1", *options)
    assert [result["test"] for result in found] == ["mqar", "niah_single_1"]
    assert said.count("Install matplotlib for plots") == len(found)
    assert not list(tmp_path.glob("*.png"))


def test_what_cannot_be_measured_ends_nothing_else(base, tmp_path):
    options = ["--window-size", "256", "--problems", "1", "--windows", "999", "--output", tmp_path]
    found, said = evaluate(base, "position", "mqar", *options)
    assert found["test"] == "mqar"
    assert "Left out: position: the text has" in said
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    result = run(base, "position", "--text", tmp_path / "empty.txt")
    assert result.exit_code == 1
    assert "Left out: position: the text has 0 tokens" in result.stderr
    (tmp_path / "latin.txt").write_bytes("müde".encode("latin-1"))
    result = run(base, "position", "--text", tmp_path / "latin.txt")
    assert result.exit_code == 1
    assert "latin.txt: cannot be read as UTF-8" in result.stderr
