"""The page in examples/space: what it does with a text and a question, without a browser."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the page's own requirement: examples/space/requirements.txt")
from families import make_model, sleep_config
from helpers import word_tokenizer, words

SPACE = Path(__file__).parent.parent / "examples" / "space"


def test_the_page_reads_asks_and_forgets(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(SPACE), *sys.path])
    import app

    model = make_model("llama", sleep_config("llama", window_size=200))
    blocks = app.page(model, word_tokenizer())
    read, ask, forget, download = (block.fn for block in blocks.fns.values())
    *_, (session, shown, text) = read(None, words(450), None)
    assert "<b>2</b> sleeps" in shown
    assert len(ask(session, "w1 w2", text)) == 2
    handed = []
    monkeypatch.setattr(app.SleepSession, "ask", lambda self, *a, **k: handed.append(self.report().tokens) or "")
    for question in ("w1", words(190)):
        ask(session, question, text)
    monkeypatch.undo()
    assert handed == [451, 1 + 200 - 1 - 48 - 64, 451, 0], "what is awake reads the end of the text, never all of it"
    assert Path(download(session)).stat().st_size > 1000
    assert forget(session)[0] is None
    assert session.report().tokens == 0
