"""Log-likelihoods through sleep, and lm-evaluation-harness on them where it is installed."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from families import make_model, sleep_config, tokens
from helpers import byte_tokenizer, save_tiny_llama

ROOT = Path(__file__).parents[1]
L = 8
PAIRS = [
    (tokens(n, seed=n).tolist(), tokens(m, seed=50 + n).tolist()) for n, m in ((30, 3), (1, 1), (9, L + 2), (L, 1))
]


@pytest.fixture
def recipe(monkeypatch):
    """Imports a recipe by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    return import_module


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_they_are_those_of_each_pair_alone(eviction, recipe):
    score = recipe("shared.log_likelihoods").log_likelihoods
    model = make_model("llama", sleep_config("llama", window_size=L, eviction=eviction), torch.double)
    expected = []
    for context, continuation in PAIRS:
        logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        said = logits.log_softmax(-1)[range(len(continuation)), continuation].sum().item()
        expected.append((pytest.approx(said, abs=1e-9), logits.argmax(-1).tolist() == continuation))
    likeliest = model(torch.tensor([PAIRS[0][0]])).logits[0, -1].argmax().item()
    pairs = [*PAIRS, (PAIRS[0][0], [likeliest])]
    for size in (1, 2, 5):
        made = score(model, pairs, size)
        assert made[:4] == expected
        assert made[4][1] is True
        assert made[0][1] is False


TASK = """\
task: counting
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: 0
doc_to_choice: [" one", " two"]
metric_list: [{{metric: acc}}]
"""


@pytest.mark.filterwarnings("default")
def test_the_harness_reads_long_contexts_whole(recipe, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    rows = [{"text": f"{i} " + "It was late. " * 40 * i} for i in (1, 2, 6)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "counting.yaml").write_text(TASK.format(file=tmp_path / "rows.json"), encoding="utf-8")
    model = save_tiny_llama(tmp_path / "base", byte_tokenizer(), torch.double)
    main = recipe("lm_evaluation").main
    options = ["--model", model, "--tasks", "counting", "--include-path", str(tmp_path / "tasks")]
    made = main([*options, "--window-size", "100", "--output", str(tmp_path / "made.json")])
    # Contexts of 522, 1,042 and 3,122 tokens, the last beyond the base's 2,048 positions; two answers of 4 each.
    assert made["sleeps"] == 2 * (5 + 10 + 31)
    assert json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))["sleeps"] == made["sleeps"]
    alone = main([*options, "--window-size", "100", "--batch-size", "1"])
    assert alone["results"]["counting"]["acc,none"] == made["results"]["counting"]["acc,none"]
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    elsewhere = main(["--model", str(bare), "--tokenizer", model, *options[2:], "--window-size", "100"])
    assert elsewhere["results"]["counting"]["acc,none"] == made["results"]["counting"]["acc,none"]
