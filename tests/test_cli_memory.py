"""The commands that run a model: what they print, keep, refuse, and leave alone."""

import builtins
import json
import signal
import warnings
from pathlib import Path

import pytest
import torch
from families import randomize
from helpers import save_tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging
from typer.testing import CliRunner, Result

from hf_sleep import AutoModelForSleepLM, SleepConfig, SleepForCausalLM, SleepSession, SleepState, __version__
from hf_sleep.cli import app
from hf_sleep.cli import chat as chat_module
from hf_sleep.cli import show as show_module
from hf_sleep.cli.app import errors_in_a_line
from hf_sleep.cli.options import generation
from hf_sleep.cli.state import described, same_tensors
from hf_sleep.steps import Steps

L = 8
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["[UNK]", "<end>", "<user>", "<assistant>", "<system>", *(f"w{i}" for i in range(40))]
TEXT = " ".join(f"w{i * i % 37}" for i in range(30))
OTHER = " ".join(f"w{i * 7 % 31}" for i in range(21))
GREEDY = ("--temperature", "0", "--max-new-tokens", "6")
HOW = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture(autouse=True)
def _quiet():
    """The commands silence transformers in their process, which here is pytest's."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture(autouse=True)
def _interruptible():
    """A shell lets what it starts in the background ignore Ctrl-C, pytest too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    return save_tiny_llama(tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture(scope="module")
def checkpoint(base: str, tmp_path_factory) -> str:
    """A sleep checkpoint in which memory matters."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = SleepForCausalLM.from_base(AutoModelForCausalLM.from_pretrained(base), SleepConfig(window_size=L))
    randomize(model.fast_weights, 1)
    randomize(model.between, 2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def loaded(checkpoint: str):
    return AutoModelForSleepLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "text.txt")


@pytest.fixture
def memory(checkpoint: str, text: str, tmp_path: Path) -> str:
    path = str(tmp_path / "text.sleep")
    done(run("read", checkpoint, text, "--memory", path))
    return path


def run(*arguments: str, stdin: str | None = None, width: int = 100) -> Result:
    runner = CliRunner(env={"COLUMNS": str(width), "NO_COLOR": None, "FORCE_COLOR": None})
    return runner.invoke(app, arguments, input=stdin)


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def asked(*arguments: str, **more) -> dict:
    return json.loads(done(run(*arguments, "--json", **more)))


def failed(result: Result, message: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    errors = [line for line in result.stderr.splitlines() if not line.startswith("Warning: ")]
    assert len(errors) == 1
    assert errors[0].startswith("Error: ")
    assert message in errors[0]


def interrupt_after(monkeypatch, owner, name: str, calls: int) -> None:
    """Press Ctrl-C in the call after so many of a method."""
    method, count = getattr(owner, name), 0

    def pressed(*args, **kwargs):
        nonlocal count
        count += 1
        if count == calls + 1:
            signal.raise_signal(signal.SIGINT)
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, pressed)


# retrofit


@pytest.mark.parametrize("more", [(), ("--only-sleep",)], ids=["whole", "only-sleep"])
def test_retrofit_writes_what_the_library_would(base: str, tmp_path: Path, more: tuple[str, ...]) -> None:
    folder = tmp_path / "made"
    said = done(run("retrofit", base, "--output", str(folder), "--window-size", "16", "--num-blocks", "1", *more))
    assert said.count("\n") == 1
    assert "1 jet block added after layer " in said
    assert f"Saved in {folder}" in said
    made = AutoModelForSleepLM.from_pretrained(folder)
    expected = SleepForCausalLM.from_base(AutoModelForCausalLM.from_pretrained(base), made.config.sleep)
    assert (made.config.sleep.window_size, made.config.sleep.num_blocks) == (16, 1)
    assert all(torch.equal(t, made.state_dict()[name]) for name, t in expected.state_dict().items())
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    whole = sum(file.stat().st_size for file in Path(base).glob("*.safetensors"))
    assert ((folder / "model.safetensors").stat().st_size < whole) is bool(more)


def test_retrofit_in_json_names_its_sizes(base: str, tmp_path: Path) -> None:
    found = asked("retrofit", base, "--output", str(tmp_path / "made"), "--dtype", "bfloat16")
    assert found["bytes"] == sum(file.stat().st_size for file in (tmp_path / "made").iterdir())
    assert (found["dtype"], found["is_checkpoint"]) == ("bfloat16", True)


def test_retrofit_refuses_to_write_over_things(base: str, checkpoint: str, tmp_path: Path) -> None:
    failed(run("retrofit", base, "--output", base), "it is there already. Name a new or empty folder")
    failed(run("retrofit", checkpoint, "--output", str(tmp_path / "new")), "is a sleep checkpoint already")
    assert not (tmp_path / "new").exists()


# generate


def test_generate_says_what_a_session_says(checkpoint: str, loaded) -> None:
    session = SleepSession(*loaded)
    expected = session.ask(TEXT, remember=True, **HOW)
    result = run("generate", checkpoint, TEXT, *GREEDY)
    assert done(result).strip() == expected
    assert f"[window {session.report().window_tokens}/{L} · " in result.stderr
    found = asked("generate", checkpoint, "-", *GREEDY, stdin=TEXT)
    assert (found["answer"], found["interrupted"]) == (expected, False)
    assert found["report"]["sleeps"] == session.report().sleeps > 2


@pytest.mark.parametrize(
    ("option", "settings"),
    [(("--no-chat",), {"chat": False}), (("--system", "w1 w2"), {"system": "w1 w2"}), (("--sleep-passes", "3"), {})],
    ids=["no-chat", "system", "settings"],
)
def test_generate_s_options_are_the_session_s(checkpoint: str, loaded, option, settings) -> None:
    passes = 3 if "--sleep-passes" in option else None
    session = SleepSession(*loaded, sleep_passes=passes, **settings)
    expected = session.ask(TEXT, remember=True, **HOW)
    found = asked("generate", checkpoint, TEXT, *GREEDY, *option)
    assert found["answer"] == expected
    assert found["report"]["tokens"] == session.report().tokens
    assert found["report"]["sleep_passes"] == session.report().sleep_passes


def test_a_seed_decides_what_is_drawn(checkpoint: str) -> None:
    how = ("--temperature", "2", "--max-new-tokens", "20")
    said = [done(run("generate", checkpoint, "w1", *how, "--seed", seed)) for seed in ("1", "1", "2")]
    assert said[0] == said[1] != said[2]


def test_ctrl_c_ends_an_answer(checkpoint: str, monkeypatch) -> None:
    whole = asked("generate", checkpoint, "w1 w2", *GREEDY[:2], "--max-new-tokens", "40")["answer"]
    interrupt_after(monkeypatch, show_module.Typed, "__call__", 3)
    result = run("generate", checkpoint, "w1 w2", *GREEDY[:2], "--max-new-tokens", "40")
    assert result.exit_code == 130
    assert "Traceback" not in result.output
    said = result.stdout.strip()
    assert said
    assert whole.startswith(said)
    assert len(said) < len(whole)


def test_words_are_not_broken_at_the_edge_of_a_terminal(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    write = show_module.Typed()
    write.width = 12
    for piece in ("one two ", "three four\n", "five ", "longer-than-the-edge ", "six"):
        write(piece)
    assert capsys.readouterr().out == "one two \nthree four\nfive \nlonger-than-the-edge\nsix"


# read and ask


def test_read_saves_what_a_session_would(memory: str, loaded, tmp_path: Path) -> None:
    session = SleepSession(*loaded)
    session.read(Path(memory).with_name("text.txt"), progress=False)
    state = SleepState.load(memory)
    assert same_tensors(state, session.to_state())
    assert [source["title"] for source in state.about["sources"]] == ["text.txt"]


def test_read_continues_a_memory_and_takes_its_settings_from_it(base: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(OTHER, encoding="utf-8")
    a, ab, both = (str(tmp_path / f"{name}.sleep") for name in ("a", "ab", "both"))
    how = ("--window-size", "12", "--eviction", "sliding", "--num-sink-tokens", "1", "--sleep-passes", "1")
    done(run("read", base, text, "--memory", a, *how))
    before = Path(a).read_bytes()
    done(run("read", base, str(tmp_path / "other.txt"), "--memory", ab, "--memory-in", a, "--sleep-passes", "1"))
    done(run("read", base, text, str(tmp_path / "other.txt"), "--memory", both, *how))
    assert Path(a).read_bytes() == before
    assert same_tensors(SleepState.load(ab), SleepState.load(both))
    found = asked("state", "show", ab)
    assert found["settings"]["window_size"] == 12
    assert [source["title"] for source in found["sources"]] == ["text.txt", "other.txt"]


def test_read_s_options(checkpoint: str, text: str, tmp_path: Path) -> None:
    more = ("--title", "A book", "--then-sleep", "--sleep-passes", "3", "--system", "w1 w2 w3")
    found = asked("read", checkpoint, text, "--memory", str(tmp_path / "a.sleep"), *more)
    report = found["report"]
    assert report["window_tokens"] == 0
    assert set(report["sleep_passes"]) == {3}
    assert report["sources"][0]["title"] == "A book"
    plain = asked("read", checkpoint, text, "--memory", str(tmp_path / "b.sleep"), "--no-chat")["report"]
    assert plain["tokens"] == 30
    assert report["tokens"] > 33
    piped = asked("read", checkpoint, "-", "--memory", str(tmp_path / "c.sleep"), "--no-chat", stdin=TEXT)["report"]
    assert (piped["tokens"], piped["sources"][0]["title"]) == (30, "stdin")


def test_read_takes_windows_from_a_store(checkpoint: str, text: str, memory: str, tmp_path: Path, monkeypatch) -> None:
    calls = []
    method = Steps.read
    monkeypatch.setattr(Steps, "read", lambda *args, **more: calls.append(args) or method(*args, **more))
    counts = []
    for name in ("a", "b"):
        done(run("read", checkpoint, text, "--memory", str(tmp_path / name), "--store", str(tmp_path / "store")))
        counts.append(len(calls))
        calls.clear()
        assert same_tensors(SleepState.load(tmp_path / name), SleepState.load(memory))
    assert counts[1] < counts[0] - 2


def test_ctrl_c_saves_what_was_read_and_the_same_command_continues(
    checkpoint: str, text: str, memory: str, tmp_path: Path, monkeypatch
) -> None:
    part = str(tmp_path / "part.sleep")
    command = ("read", checkpoint, text, "--memory", part)
    with monkeypatch.context() as patch:
        interrupt_after(patch, Steps, "read", 3)
        result = run(*command)
    assert (result.exit_code, result.stdout) == (130, "")
    assert f"Interrupted. What was read until then is in {part}" in result.stderr
    found = asked("state", "show", part)
    assert 0 < found["sources"][0]["tokens"] < 30
    result = run(*command, "--memory-in", part)
    done(result)
    assert f"text.txt: {found['sources'][0]['tokens']} of 30 tokens were read before, and it continues there." in (
        result.stderr
    )
    assert same_tensors(SleepState.load(part), SleepState.load(memory))
    result = run(*command, "--memory-in", part)
    assert "text.txt: 30 of 30 tokens were read before." in result.stderr
    assert done(run("state", "diff", part, memory)).startswith(
        "All tensors are identical; what is known of them is not"
    )
    assert same_tensors(SleepState.load(part), SleepState.load(memory))


def test_ctrl_c_before_the_first_window_saves_nothing(checkpoint: str, text: str, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "part.sleep"
    interrupt_after(monkeypatch, Steps, "read", 1)
    result = run("read", checkpoint, text, "--memory", str(path), "--json")
    assert result.exit_code == 130
    assert json.loads(result.stdout)["interrupted"]
    assert not path.exists()


def test_ask_answers_as_a_session_does_and_leaves_the_file_alone(checkpoint: str, memory: str, loaded) -> None:
    before = Path(memory).read_bytes()
    session = SleepSession.load(memory, *loaded)
    questions = ["w1 w2", "w3", "w4 w5 w6"]
    expected = session.ask_many(questions, **HOW)
    assert len(set(expected)) > 1
    found = asked("ask", checkpoint, "--memory", memory, *questions, *GREEDY)
    assert [pair["answer"] for pair in found["answers"]] == expected
    assert done(run("ask", checkpoint, "--memory", memory, questions[0], *GREEDY)).strip() == expected[0]
    shown = done(run("ask", checkpoint, "--memory", memory, "-", *GREEDY, stdin="\n".join(questions)))
    assert shown == "".join(f"{q}\n{a}\n\n" for q, a in zip(questions, expected, strict=True))
    assert Path(memory).read_bytes() == before


def test_an_untrained_base_says_so_once(base: str, checkpoint: str, text: str, tmp_path: Path) -> None:
    path = str(tmp_path / "a.sleep")
    result = run("read", base, text, "--memory", path, "--window-size", "8")
    done(result)
    assert result.stderr.count("was never trained to sleep") == 1
    assert "Warning" not in run("generate", checkpoint, "w1", *GREEDY).stderr
    done(run("ask", base, "--memory", path, "w1", *GREEDY))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["read", "MODEL", "TEXT", "--memory", "MEMORY"], "to read more into it, pass --memory-in"),
        (["read", "MODEL", "TEXT", "--memory", "none/a.sleep"], "there is no folder"),
        (["read", "MODEL", "none.txt", "--memory", "NEW"], "there is no file none.txt"),
        (["read", "MODEL", "LATIN", "--memory", "NEW"], "is no text in UTF-8 (invalid continuation byte at byte 1)"),
        (["read", "MODEL", "EMPTY", "--memory", "NEW"], "empty.txt holds no text"),
        (["read", "MODEL", "TEXT", "TEXT", "--title", "a", "--memory", "NEW"], "--title names one file, and 2"),
        (["read", "MODEL", "TEXT", "--memory", "NEW", "--memory-in", "none.sleep"], "there is no file none.sleep"),
        (["read", "MODEL", "TEXT", "--memory", "NEW", "--memory-in", "MEMORY", "--system", "w1"], "--system is what a"),
        (["chat", "MODEL", "--memory", "MEMORY", "--system", "w1"], "--system is what a memory begins with"),
        (["ask", "MODEL", "--memory", "none.sleep", "w1"], "there is no file none.sleep"),
        (["ask", "MODEL", "--memory", "TEXT", "w1"], "is no sleep state"),
        (["ask", "MODEL", "--memory", "MEMORY", " "], "a question says nothing"),
        (["ask", "BASE", "--memory", "MEMORY", "w1"], "the state was saved by another model"),
        (["ask", "MODEL", "--memory", "MEMORY", "w1", "--window-size", "9"], "saved with window_size=8"),
        (["generate", "none/none/none", "w1"], "there is no folder none/none/none"),
        (["generate", "BARE", "w1"], "holds no tokenizer that loads: pass --tokenizer"),
        (["generate", "MODEL", "w1", "--tokenizer", "EMPTY_FOLDER"], "holds no tokenizer that loads"),
        (["generate", "MODEL", "w1", "--device", "nothing"], "--device nothing cannot be used here"),
        (["generate", "MODEL", " "], "it must be a string that says something"),
        (["bench", "MODEL", "--tokens", "5000"], "the base has 2,048 positions, so use at most 2016"),
        (["bench", "MODEL", "--text", "EMPTY"], "it holds no text"),
        (["bench", "MODEL", "--passes", "2,0"], "--passes 0: a window is read once at least, so use 1 or more"),
    ],
)
def test_errors_are_one_line(base, checkpoint, memory, text, tmp_path, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes("sé w1 w2".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    AutoModelForSleepLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "bare")
    (tmp_path / "nothing").mkdir()
    names = {"MODEL": checkpoint, "BASE": base, "TEXT": text, "MEMORY": memory, "LATIN": "latin.txt"}
    names |= {"EMPTY": "empty.txt", "BARE": "./bare", "EMPTY_FOLDER": "./nothing", "NEW": "new.sleep"}
    failed(run(*[names.get(part, part) for part in arguments]), message)
    assert not (tmp_path / "new.sleep").exists()


def test_out_of_memory_says_what_to_try(checkpoint: str, monkeypatch) -> None:
    def fail(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(Steps, "answer", fail)
    failed(run("generate", checkpoint, "w1"), "out of memory (tried to allocate 2 GiB): try --dtype bfloat16")


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(capsys) -> None:
    with errors_in_a_line():
        warnings.warn("it is\nold", stacklevel=1)
    assert capsys.readouterr().err == "Warning: it is old\n"


# chat


def lines_of(*lines: str) -> str:
    return "\n".join(lines) + "\n"


def test_chat_from_a_pipe_answers_as_a_session_does(checkpoint: str, memory: str, loaded) -> None:
    session = SleepSession.load(memory, *loaded)
    expected = [session.chat(message, **HOW) for message in ("w1 w2", "/w3 w4")]
    said = lines_of("w1 w2", "", "//w3 w4")
    result = run("chat", checkpoint, "--memory", memory, *GREEDY, stdin=said)
    assert done(result).split("\n") == [*expected, ""]
    assert result.stderr.count("[window ") == 2
    records = [
        json.loads(line)
        for line in done(run("chat", checkpoint, "--memory", memory, *GREEDY, "--json", stdin=said)).splitlines()
    ]
    assert [record["answer"] for record in records] == expected
    assert records[-1]["report"]["tokens"] == session.report().tokens


def test_the_chat_s_commands(checkpoint: str, text: str, tmp_path: Path, loaded) -> None:
    saved = str(tmp_path / "chat.sleep")
    steps = ["w1 w2", f"/read {text}", "/sleep", f"/save {saved}", "w3", "/undo", "w4", "/rollback", "/forget"]
    steps += [f"/load {saved}", "/save", "/report", "/help", "/exit", "w5"]
    records = [
        json.loads(line)
        for line in done(run("chat", checkpoint, *GREEDY, "--json", stdin=lines_of(*steps))).splitlines()
    ]
    assert [record.get("command", record.get("message")) for record in records] == steps[:-2]
    tokens = [record["report"]["tokens"] for record in records]
    windows = [record["report"]["window_tokens"] for record in records]
    assert tokens[1] > tokens[0] + 30
    assert windows[2] == 0
    assert tokens[2] == tokens[3] == tokens[5] < tokens[4]
    assert tokens[7] <= tokens[6]
    assert records[7]["report"]["window_tokens"] == 0
    assert tokens[8] == 0
    assert set(tokens[9:]) == {tokens[3]}
    assert SleepSession.load(saved, *loaded).report().tokens == tokens[3]


def test_what_the_chat_shows(checkpoint: str, text: str) -> None:
    result = run("chat", checkpoint, *GREEDY, stdin=lines_of(f"/read {text}", "/report", "/help"), width=60)
    assert max(map(len, done(result).splitlines())) <= 60
    assert "text.txt      30" in result.stdout
    assert all(f"/{name} " in result.stderr for name in chat_module.COMMANDS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/read", "a file's name is missing: /read notes.txt"),
        ("/save", "a file's name is missing: /save notes.sleep"),
        ("/read none.txt", "there is no file none.txt"),
        ("/load none.sleep", "there is no file none.sleep"),
        ("/save TEXT", "exists: take another name"),
        ("/undo", "there is nothing to undo"),
        ("/rollback", "there is no sleep to go back to"),
        ("/what", "there is no /what: /help lists the commands"),
    ],
)
def test_a_failing_line_ends_no_chat(checkpoint: str, text: str, line: str, message: str) -> None:
    result = run("chat", checkpoint, *GREEDY, stdin=lines_of(line.replace("TEXT", text), "w1"))
    assert result.exit_code == 1
    assert result.stdout.strip()
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr.splitlines()[0]
    result = run("chat", checkpoint, *GREEDY, "--json", stdin=lines_of(line.replace("TEXT", text)))
    assert result.exit_code == 1
    assert message in json.loads(result.stdout)["error"]


def test_ctrl_c_in_a_piped_chat_ends_it(checkpoint: str, monkeypatch) -> None:
    interrupt_after(monkeypatch, show_module.Typed, "__call__", 1)
    result = run("chat", checkpoint, *GREEDY, stdin=lines_of("w1 w2", "w3"))
    assert result.exit_code == 130
    assert result.stderr.count("[window ") == 1


def type_at_a_terminal(monkeypatch, *steps: str | type[BaseException]) -> None:
    """Type lines, or press keys that raise."""
    left = iter(steps)

    def type_next(prompt: str) -> str:
        step = next(left)
        if isinstance(step, str):
            return step
        raise step

    monkeypatch.setattr(builtins, "input", type_next)


def test_at_a_terminal_ctrl_c_ends_an_answer_and_ctrl_d_the_chat(loaded, monkeypatch, capsys) -> None:
    type_at_a_terminal(monkeypatch, "w1 w2", KeyboardInterrupt, "w3", "/exit-not", EOFError)
    interrupt_after(monkeypatch, show_module.Typed, "__call__", 1)
    session = SleepSession(*loaded)
    assert chat_module.Chat(session, HOW, {}).run_at_a_terminal() == 0
    said = capsys.readouterr()
    assert said.err.count("[window ") == 3
    assert "(Ctrl-D ends the chat.)" in said.err
    assert "there is no /exit-not" in said.err
    twin = SleepSession(*loaded)
    first = [piece for piece, _ in zip(twin.stream("w1 w2", remember=True, **HOW), range(2), strict=False)]
    assert said.out.splitlines()[0].strip() == first[0].strip()


@pytest.mark.parametrize("json_lines", [False, True])
@pytest.mark.parametrize(
    ("line", "owner", "name"),
    [
        ("/sleep", SleepSession, "sleep"),
        ("/save FILE", SleepSession, "save"),
        ("/load FILE", chat_module, "load_state"),
        ("/read FILE", chat_module, "text_in"),
        ("/report", SleepSession, "report"),
    ],
)
def test_at_a_terminal_ctrl_c_ends_a_command_and_keeps_the_memory(
    loaded, monkeypatch, capsys, tmp_path, line, owner, name, json_lines
) -> None:
    session, line = SleepSession(*loaded), line.replace("FILE", str(tmp_path / "a.sleep"))
    session.read("w1 w2 w3", progress=False)
    type_at_a_terminal(monkeypatch, line, "/undo", EOFError)
    interrupt_after(monkeypatch, owner, name, name == "report")  # of which the first is the greeting's
    held, after = session._held, []
    monkeypatch.setattr(session, "undo", lambda: after.append(session._held))
    assert chat_module.Chat(session, HOW, {}, json=json_lines).run_at_a_terminal() == 0
    assert after == [held]
    said = capsys.readouterr()
    assert said.err.count("Interrupted.") == 1
    assert list(tmp_path.iterdir()) == []
    if json_lines:
        assert [json.loads(text).get("interrupted") for text in said.out.splitlines()] == [True, None]


# state


def test_show_and_verify(checkpoint: str, base: str, memory: str, loaded) -> None:
    session = SleepSession.load(memory, *loaded)
    report, found = session.report(), asked("state", "show", memory)
    assert (found["bytes"], found["kv_bytes"]) == (report.num_bytes, report.kv_bytes)
    assert found["fast_weight_bytes"] == report.fast_weight_bytes
    assert found["rows"][0]["seen"] == report.tokens
    assert found["sleep_passes"] == report.sleep_passes
    shown = done(run("state", "show", memory, width=60))
    assert max(map(len, shown.splitlines())) <= max(60, len(memory))
    assert f"{report.tokens}, of them {report.window_tokens} in the window of {L}" in shown
    assert "text.txt" in shown
    assert done(run("state", "verify", memory)) == f"{memory} is whole.\n"
    said = done(run("state", "verify", memory, "--model", checkpoint))
    assert said == f"{memory} is whole, and {checkpoint} can continue it.\n"
    failed(run("state", "verify", memory, "--model", base), "the state was saved by another model")
    assert asked("state", "verify", memory, "--model", checkpoint)["whole"]


def test_verify_finds_damage(memory: str) -> None:
    data = bytearray(Path(memory).read_bytes())
    data[-3] ^= 1
    Path(memory).write_bytes(data)
    failed(run("state", "verify", memory), "is damaged")


def test_verify_and_show_take_a_state_that_no_session_saved(checkpoint: str, loaded, tmp_path: Path) -> None:
    model, _ = loaded
    cache = model(torch.randint(1, 40, (2, 21)), use_cache=True).cache
    path = str(tmp_path / "two.sleep")
    SleepState.from_cache(model, cache).save(path)
    done(run("state", "verify", path, "--model", checkpoint))
    shown = done(run("state", "show", path))
    assert "21, 21, of them 5, 5 in the window of 8" in shown


@pytest.mark.parametrize("saved", ["\x1b[2J", float("inf"), float("nan"), -1.0, 1e300], ids=str)
def test_show_takes_nothing_on_trust(memory: str, saved: object) -> None:
    state = SleepState.load(memory)
    state.fingerprint, bad = "\x1b[31mabc", "\x1b[31mred\n"
    sources = [{"title": bad, "tokens": 1, "sha256": bad}, {"title": 3}, "text"]
    state.about |= {"passes": "many", "saved": saved, "sources": sources}
    state.save(memory)
    shown = done(run("state", "show", memory))
    assert "\x1b" not in shown
    assert shown.count("?[31mred?") == 2
    assert "saved" not in shown
    assert described(state)["sources"] == sources[:1]
    assert "\x1b" not in run("state", "verify", memory, "--model", "\x1b[31m/none/none").stderr


def test_diff(checkpoint: str, memory: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(OTHER, encoding="utf-8")
    more = str(tmp_path / "more.sleep")
    done(run("read", checkpoint, str(tmp_path / "other.txt"), "--memory", more, "--memory-in", memory))
    assert done(run("state", "diff", memory, memory)) == "The memories are identical.\n"
    assert asked("state", "diff", memory, memory)["identical"]
    found = asked("state", "diff", memory, more)
    assert not found["identical"]
    assert not found["same_tensors"]
    assert set(found["differ"]) >= {"rows", "sources"}
    a, b = SleepState.load(memory), SleepState.load(more)
    (slot,) = (int(name.split(".")[1]) for name, t in a.tensors.items() if name.startswith("layers") and t.dim() == 3)
    one, other = (state.tensors[f"layers.{slot}.0"].double() for state in (a, b))
    ((name, distance),) = found["fast_weights"].items()
    assert name == f"block after layer {a.settings['block_layers'][0]}"
    assert distance == pytest.approx(((other - one).norm() / one.norm()).item())
    assert distance > 0.01
    shown = done(run("state", "diff", memory, more, width=70))
    assert max(map(len, shown.splitlines())) <= 70
    assert f"{distance:.4f}" in shown
    assert [line.split()[-1] for line in shown.splitlines() if ".txt" in line] == ["both", "B"]


# env and bench


def test_env_says_what_a_bug_report_needs() -> None:
    found = asked("env")
    assert (found["hf_sleep"], found["torch"]) == (__version__, torch.__version__)
    assert found["threads"].startswith(f"{torch.get_num_threads()} of ")
    for name in ("transformers", "python", "platform", "CUDA", "cards", "flash-linear-attention", "default dtype"):
        assert name in found
    assert f"hf_sleep                {__version__}" in done(run("env"))


def test_bench_measures_all_on_one_text(checkpoint: str, text: str) -> None:
    found = asked("bench", checkpoint, "--tokens", "24", "--decode", "2", "--text", text, "--passes", "1,4,1")
    config = AutoModelForCausalLM.from_pretrained(checkpoint).config.text_config
    per_token = 2 * config.num_hidden_layers * config.hidden_size * 4
    assert found["base"]["bytes_held"] == 24 * per_token
    assert found["sleep"]["bytes_held"] > L * per_token
    assert found["sleep"]["seconds_per_sleep"] > 0
    assert found["base"]["seconds_per_sleep"] is None
    assert found["ratio"]["bytes_held"] == found["sleep"]["bytes_held"] / found["base"]["bytes_held"]
    assert list(found["others"]) == ["N = 1", "N = 4", "StreamingLLM"]
    streaming = found["others"]["StreamingLLM"]["bytes_held"]
    assert 0 < streaming <= found["sleep"]["bytes_held"]
    assert streaming % per_token == 0
    for one in (found["sleep"], found["base"], *found["others"].values()):
        assert one["first_token_seconds"] == pytest.approx(24 / one["read_tokens_per_second"])
        assert one["peak_bytes"] > one["bytes_held"]


def test_bench_shows_two_tables(checkpoint: str) -> None:
    shown = done(run("bench", checkpoint, "--tokens", "12", "--decode", "1", width=80))
    assert "12 tokens read, 1 decoded; L = 8, N = 2" in shown
    assert "sleep/base" in shown
    assert "StreamingLLM/base" in shown


def test_bench_says_why_streaming_llm_is_left_out(checkpoint: str, monkeypatch) -> None:
    def refuse(*arguments):
        raise ValueError("the base has other layers")

    monkeypatch.setattr("hf_sleep.cli.readers.StreamingLLM", refuse)
    result = run("bench", checkpoint, "--tokens", "12", "--decode", "1", "--json")
    assert "Without StreamingLLM: the base has other layers" in result.stderr
    assert json.loads(result.stdout)["others"] == {}


# help


def test_the_help_of_every_command_needs_no_torch() -> None:
    from test_cli import run_in_a_new_process

    commands = ["retrofit", "generate", "read", "ask", "chat", "state", "state show", "state verify", "state diff"]
    commands += ["env", "bench", "serve"]
    code = """
import sys
from hf_sleep_command import main
for command in sys.argv[1:]:
    sys.argv = ["hf-sleep", *command.split(), "--help"]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, command
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    assert run_in_a_new_process(code, *commands).endswith("\n[]\n")


def test_a_byte_that_is_no_utf8_is_an_error_in_a_line(checkpoint: str) -> None:
    """As Python gives it in arguments, and in a pipe where the locale is C."""
    result = run("generate", checkpoint, "w1 \udcff", "--max-new-tokens", "2")
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: the text is no Unicode: at 3 is")


def test_a_temperature_too_small_to_divide_by_is_that_of_a_greedy_answer() -> None:
    asked = {"seed": None, "max_new_tokens": 3}
    assert generation(asked | {"temperature": 1e-45}) == generation(asked | {"temperature": 0.0})
    assert generation(asked | {"temperature": 1e-5})["do_sample"]
