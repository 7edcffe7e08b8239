"""The recipe that teaches a model to remember from plain text, on a tiny model, and the rows that it trains on."""

import json
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import byte_tokenizer, save_tiny_llama
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from hf_sleep import AutoModelForSleepLM
from hf_sleep.data import Text, TextRows
from hf_sleep.data.text import AFTER, BEFORE
from hf_sleep.training import SleepCollator

ROOT = Path(__file__).parents[1]
L = 40
QUICK = ["--window-size", str(L), "--steps", "4", "--gradient-accumulation-steps", "2", "--eval-rows", "2"]
QUICK += ["--evaluations", "2", "--windows", "2", "3", "--top-k", "8"]
SENTENCES = [f"Number {i} is next to number {i * 7 % 31}, and nobody knows why. " for i in range(400)]


@pytest.fixture
def recipe(monkeypatch):
    """Imports a recipe by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    return import_module


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny llama and its tokenizer."""
    return save_tiny_llama(tmp_path_factory.mktemp("base"), byte_tokenizer())


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """A folder with texts, and with what is none."""
    folder = tmp_path_factory.mktemp("notes")
    (folder / "deep").mkdir()
    (folder / ".hidden").mkdir()
    for i, name in enumerate(("a.txt", "b.md", "deep/c.rst")):
        (folder / name).write_text("".join(SENTENCES[100 * i : 100 * (i + 1)]), encoding="utf-8")
    (folder / "image.png").write_bytes(b"\xff\xfe")
    (folder / ".hidden" / "d.txt").write_text("hidden", encoding="utf-8")
    (folder / "empty.txt").write_text(" \n", encoding="utf-8")
    return folder


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def model_weights(folder):
    return load_file(folder / "model" / "model.safetensors")


# Rows.


def text_of(*lengths):
    """Documents of tokens that count up, so that each tells its place."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return Text(torch.arange(ends[-1], dtype=torch.int32), ends)


def rows_of(text, stages=((50, 2), (50, 4)), **fields):
    return TextRows(text, byte_tokenizer(), L, stages, **fields)


def test_rows_are_windows_of_the_text_in_order():
    rows = rows_of(text_of(3000))
    assert len(rows) == 100
    for i in range(100):
        ids = rows[i]["input_ids"]
        assert ids == list(range(ids[0], ids[0] + (2 if i < 50 else 4) * L))
        assert rows[i]["labels"] == ids
        assert rows[i].keys() == {"input_ids", "labels"}
    starts = [rows[i]["input_ids"][0] for i in range(100)]
    assert len(set(starts)) > 90
    assert max(starts) > 2500
    assert starts == [rows_of(text_of(3000))[i]["input_ids"][0] for i in range(100)]
    assert starts != [rows_of(text_of(3000), seed=1)[i]["input_ids"][0] for i in range(100)]
    with pytest.raises(IndexError):
        rows[100]
    assert len(list(rows)) == 100


def test_rows_that_ask_are_answered_by_what_was_slept_on():
    tokenizer = byte_tokenizer()
    before, after = (tokenizer(t)["input_ids"] for t in (BEFORE, AFTER))
    rows = rows_of(text_of(100_000), [(200, 4)], reconstruct=0.3)
    asking = [row for row in rows if row["labels"][0] == -100]
    assert 40 < len(asking) < 80
    distances = []
    for row in asking:
        ids, labels = row["input_ids"], row["labels"]
        told, question = ids[: 3 * L], ids[3 * L :]
        assert told == list(range(told[0], told[0] + 3 * L))
        assert len(question) <= L
        assert question[: len(before)] == before
        given = question[len(before) : len(before) + rows.given]
        assert question[len(before) + rows.given :][: len(after)] == after
        passage = [*given, *question[-rows.asked :]]
        assert passage == list(range(passage[0], passage[0] + rows.given + rows.asked))
        assert passage[0] >= told[0]
        assert passage[-1] <= told[-1]
        assert [label for label in labels if label != -100] == passage[rows.given :]
        assert labels[-rows.asked :] == passage[rows.given :]
        distances.append(passage[0] - told[0])
    assert min(distances) < L < 2 * L < max(distances)


def test_a_long_window_holds_several_questions():
    rows = TextRows(text_of(5000), byte_tokenizer(), 160, [(5, 2)], reconstruct=1.0)
    assert 160 // rows.question == 2
    for row in rows:
        assert len(row["input_ids"]) == 160 + 2 * rows.question
        answers = [label for label in row["labels"] if label != -100]
        assert len(answers) == 2 * rows.asked
        assert abs(answers[0] - answers[rows.asked]) >= rows.given + rows.asked  # none tells of the other


def test_rows_sleep_at_the_ends_of_documents_and_before_they_ask():
    ends = {70, 71, 200, 1000}
    text = text_of(70, 1, 129, 800)
    for row in rows_of(text, [(60, 3)], reconstruct=0.5, sleep_at_ends=True):
        ids, marks = row["input_ids"], row["sleep_after"]
        assert len(marks) == len(ids)
        asks = row["labels"][0] == -100
        told = 2 * L if asks else 3 * L
        expected = [int(i + 1 in ends) for i in ids[:told]]
        if asks:
            expected[-1] = 1
        assert marks == expected + [0] * (len(ids) - told)
    assert sum(sum(row["sleep_after"]) for row in rows_of(text, [(60, 3)], sleep_at_ends=True)) > 10


@pytest.mark.parametrize(
    ("lengths", "ends", "held_ends"),
    [
        ((4000,), [3800], [200]),
        ((100,) * 40, [100 * i for i in range(1, 39)], [100, 200]),
        ((500, 180, 20, 270, 30), [500, 680, 700, 950], [20, 50]),  # a tail of the long one before the last
        ((940, 20, 40), [940], [20, 60]),
    ],
)
def test_the_end_of_a_text_is_held_out(lengths, ends, held_ends):
    text = text_of(*lengths)
    rest, held = text.held_out()
    assert torch.equal(torch.cat([rest.tokens, held.tokens]), text.tokens)
    assert (rest.ends, held.ends) == (ends, held_ends)
    assert len(held) >= 0.05 * len(text)
    assert len(text.held_out(0.5)[1]) >= 0.5 * len(text)


def test_documents_are_read_with_their_ends_and_up_to_a_number_of_tokens():
    tokenizer = byte_tokenizer()
    documents = ["One.", "  ", "Three and more."] * 200
    text = Text.of(documents, tokenizer)
    assert len(text.ends) == 400
    assert text.tokens[: text.ends[0]].tolist() == [*tokenizer("One.")["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(text.tokens[: text.ends[1]]) == "One.<|im_end|>Three and more.<|im_end|>"
    assert text.ends[-1] == len(text)
    assert 100 <= len(Text.of(documents, tokenizer, most=100)) < 120


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": [(5, 90)]}, "the text has 3000 tokens, and a row of 90 windows 3600"),
        ({"stages": [(5, 0)]}, r"windows=\[0\] in the stages"),
        ({"reconstruct": 1.2}, "reconstruct=1.2 must be a share"),
        ({"reconstruct": 0.1, "window_size": 30}, "window_size=30 with reconstruct=0.1: a question takes 33 tokens"),
    ],
)
def test_rows_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TextRows(text_of(3000), byte_tokenizer(), **{"window_size": L, "stages": [(5, 2)]} | fields)


# Where texts come from.


def test_texts_come_from_files_folders_and_datasets(recipe, notes, tmp_path):
    read = recipe("shared.texts").documents
    texts = [(notes / name).read_text(encoding="utf-8") for name in ("a.txt", "b.md", "deep/c.rst")]
    assert [t for t in read([notes], None, "text", "train") if t.strip()] == texts
    assert list(read([notes / "b.md", notes / "a.txt"], None, "text", "train")) == texts[1::-1]
    data = Dataset.from_dict({"body": [texts[0], None, *texts[1:]], "number": [1, 2, 3, 4]})
    data.save_to_disk(tmp_path / "disk")
    data.to_json(tmp_path / "rows.jsonl")
    for name in ("disk", "rows.jsonl"):
        assert list(read([], str(tmp_path / name), "body", "train")) == [texts[0], "", *texts[1:]]
        with pytest.raises(SystemExit, match=r"--column text: the dataset .* has body, number"):
            read([], str(tmp_path / name), "text", "train")
    assert any("lambda" in t for t in read([], None, "text", "train"))
    with pytest.raises(SystemExit, match="give one of them"):
        read([notes], "disk", "text", "train")
    with pytest.raises(SystemExit, match="cannot be read as UTF-8"):
        list(read([notes / "image.png"], None, "text", "train"))
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match="no text file is in this folder"):
        list(read([tmp_path / "none"], None, "text", "train"))


# The recipe.


def test_a_base_learns_from_a_folder_and_everything_is_written_down(recipe, base, notes, tmp_path, capsys):
    folder = tmp_path / "run"
    options = ["--model", base, "--text", str(notes), *QUICK, "--steps", "29", "--output", str(folder)]
    options += ["--evaluations", "3"]
    options += ["--no-bf16", "--distill", "0.2", "--muon-learning-rate", "5e-2"]  # its teacher knows nothing
    results = recipe("remember").main(options)
    assert results == json.loads((folder / "results.json").read_text(encoding="utf-8"))
    kinds = {"text_loss", "asked_loss", "recovered", "by_memory", "position"}
    assert results["before"].keys() == results["after"].keys() == kinds
    untrained, trained = (results[when]["position"]["reads"] for when in ("before", "after"))
    losses = [untrained[name]["loss_by_window"] for name in ("sleep, N = 1", "window alone", "memory zeroed")]
    assert losses[0] == losses[1] == losses[2]
    assert trained["sleep, N = 1"]["loss_by_window"] != trained["memory zeroed"]["loss_by_window"]
    assert trained["window alone"]["loss_by_window"] == losses[1]
    assert (folder / "position.png").stat().st_size > 5_000
    assert results["after"]["text_loss"] < 0.95 * results["before"]["text_loss"]
    judged = [line["step"] for line in lines(folder) if "eval_text_loss" in line]
    assert judged == [0, 10, 19, 29]
    assert [line["step"] for line in lines(folder) if "loss" in line] == list(range(1, 30))
    assert (folder / "loss.png").stat().st_size > 5_000
    assert "held-out text loss: " in capsys.readouterr().out
    model, lm = AutoModelForSleepLM.from_pretrained(folder / "model"), LlamaForCausalLM.from_pretrained(base)
    assert (model.config.sleep.window_size, model.config.sleep.sleep_passes) == (L, 1)
    assert all(torch.equal(model.lm.get_parameter(name), parameter) for name, parameter in lm.named_parameters())
    held_out = Text.of(recipe("shared.texts").documents([notes], None, "text", "train"), byte_tokenizer()).held_out()[1]
    rows = recipe("remember").held_out_rows(recipe("remember").parse_arguments(options), held_out, byte_tokenizer())
    for name, some in rows.items():
        assert len(some) == 2
        batch = SleepCollator()(some)
        with torch.no_grad():
            loss = model.eval()(**batch).loss.item()
        assert results["after"][f"{name}_loss"] == pytest.approx(loss, rel=1e-5)
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert "29 steps of 4 rows of up to 3 windows" in card
    assert str(notes) in card
    with pytest.raises(SystemExit, match="holds a run already: choose another --output, or continue with --resume"):
        recipe("remember").main(options)


@pytest.mark.parametrize("how", ["", "--lora 2", "--whole-model"])
def test_a_run_in_parts_ends_as_one_in_one_piece(how, recipe, base, notes, tmp_path, capsys):
    """And trains what it says."""
    main, whole, parts = recipe("remember").main, tmp_path / "whole", tmp_path / "parts"
    options = ["--model", base, "--text", str(notes), *QUICK, "--steps", "2", "--evaluations", "1", *how.split()]
    options += ["--learning-rate", "1e-2"]
    expected = main([*options, "--output", str(whole)])
    options += ["--resume", "--output", str(parts)]
    for step in (1, 2):
        assert main([*options, "--minutes", "0"]) == {}
        assert f"stopped at step {step} of 2" in capsys.readouterr().out
    assert main([*options, "--minutes", "1e6"]) == expected
    weights, again = model_weights(whole), model_weights(parts)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    lm = LlamaForCausalLM.from_pretrained(base).state_dict()
    changed = {name for name, tensor in lm.items() if not torch.equal(weights[f"lm.{name}"], tensor)}
    projections = {name for name in lm if name.endswith("_proj.weight")}
    assert changed == {"": set(), "--lora 2": projections, "--whole-model": set(lm)}[how]
    assert any(t.any() for name, t in weights.items() if name.endswith("mixer.o_proj.weight"))
    model = AutoModelForSleepLM.from_pretrained(parts / "model")
    assert model.config.sleep.between == ("none" if how == "--whole-model" else "gate")


def test_every_option_of_a_row_and_of_the_loss_counts(recipe, base, tmp_path):
    Dataset.from_dict({"body": ["".join(SENTENCES[i : i + 5]) for i in range(0, 300, 5)]}).to_json(tmp_path / "r.jsonl")
    options = ["--model", base, "--dataset", str(tmp_path / "r.jsonl"), "--column", "body", *QUICK]
    options += ["--evaluations", "1", "--eval-rows", "1"]
    losses = {}
    arms = ["", "--sleep-at-ends", "--pass-states 1", "--distill 0", "--recurring-weight 9", "--recurring-tokens 1"]
    for more in [*arms, "--reconstruct 0", "--most-tokens 6000"]:
        folder = tmp_path / (more.replace(" ", "") or "plain")
        recipe("remember").main([*options, *more.split(), "--output", str(folder)])
        losses[more] = tuple(line["loss"] for line in lines(folder) if "loss" in line)
    assert len(set(losses.values())) == len(losses), Counter(losses.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--windows 4 2", "--windows 4 2: they must be at least 1, and rise"),
        ("--windows 2 2", "--windows 2 2: they must be at least 1, and rise"),
        ("--windows 1 2 3 4 5 6 7 8", "--windows has 8 stages"),
        ("--lora 0", "--lora 0: it must be a rank of at least 1"),
        ("--lora 2 --whole-model", "--lora with --whole-model or --push-to-hub"),
        ("--evaluations 0", "--evaluations 0: it must be at least 1"),
        ("--windows 900", "a row of 900 windows 36000"),
        ("--window-size 20", "a question takes"),
        ("--distill 2", r"Distillation.share=2"),
    ],
)
def test_what_cannot_work_is_said(arguments, message, recipe, base, notes, tmp_path, capsys):
    options = ["--model", base, "--text", str(notes), *QUICK, "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        recipe("remember").main([*options, *arguments.split()])
    assert message in str(stopped.value) + capsys.readouterr().err
