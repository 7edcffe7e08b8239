"""A page to watch a model read, sleep and answer: python examples/space/app.py [--model FOLDER]

Paste or upload a text, watch its windows fill and be slept on, then ask. The same question goes to the same model with
no sleep, which sees only as much of the end of the text as fits into a window. The memory can be downloaded.
"""

import argparse
import os
import tempfile
from pathlib import Path

import gradio as gr
from transformers import AutoTokenizer

from hf_sleep import AutoModelForSleepLM, SleepSession

MODEL = os.environ.get("HF_SLEEP_MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
ANSWER = {"max_new_tokens": 48, "do_sample": False}
INTRO = """# A model that sleeps
When its window is full, the model runs over it again, writes it into **fast weights** of fixed size, and drops its
keys and values. Blocks that were never trained remember nothing of what they slept on: load a trained checkpoint
(`HF_SLEEP_MODEL`) to see it remember."""


def tokenizer_of(name: str, model):
    """The checkpoint's, or its base's where it holds new weights alone."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return AutoTokenizer.from_pretrained(model.config.base_model_name_or_path)


def bar(session: SleepSession) -> str:
    """The window and the sleeps, as HTML."""
    report, size = session.report(), session.model.config.sleep.window_size
    cells = "".join("<span title='slept on'>◼</span>" for _ in range(min(report.sleeps, 200)))
    share = round(100 * report.window_tokens / size)
    box = f"<div style='background:#f0a030;height:100%;width:{share}%'></div>"
    return (
        f"<div style='color:#6a5acd;letter-spacing:2px'>{cells}</div>"
        f"<div style='border:1px solid #888;height:14px'>{box}</div>"
        f"<p><b>{report.tokens:,}</b> tokens read, <b>{report.sleeps}</b> sleeps, {report.window_tokens} of {size} "
        f"tokens in the window; memory {report.num_bytes / 1e6:.1f} MB, asleep {report.seconds_asleep:.1f} s</p>"
    )


def page(model, tokenizer) -> gr.Blocks:
    """The app."""

    def read(session, text, file):
        text = Path(file).read_text(encoding="utf-8") if file else text
        if not text.strip():
            raise gr.Error("Paste a text, or upload one.")
        session = session or SleepSession(model, tokenizer)
        ids, size = tokenizer(text, add_special_tokens=False, verbose=False).input_ids, model.config.sleep.window_size
        for first in range(0, len(ids), size // 4):
            session.read(ids[first : first + size // 4], title=Path(file).name if file else "pasted", progress=False)
            yield session, bar(session), text

    def ask(session, question, text):
        if session is None or not question.strip():
            raise gr.Error("Read a text first, then ask.")
        awake = SleepSession(model, tokenizer)
        room = model.config.sleep.window_size - len(tokenizer(question).input_ids) - ANSWER["max_new_tokens"] - 64
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        awake.read(ids[max(0, len(ids) - max(0, room)) :], progress=False)
        return session.ask(question, **ANSWER), awake.ask(question, **ANSWER)

    def download(session):
        if session is None:
            raise gr.Error("Read a text first.")
        path = Path(tempfile.mkdtemp()) / "memory.sleep"
        session.save(path)
        return str(path)

    def forget(session):
        if session is not None:
            session.forget()
        return None, "", ""

    with gr.Blocks(title="A model that sleeps") as blocks:
        gr.Markdown(INTRO)
        session, seen = gr.State(), gr.State("")
        with gr.Row():
            with gr.Column():
                text = gr.Textbox(label="Text", lines=12, elem_id="text")
                file = gr.File(label="or a text file", file_types=[".txt", ".md"], type="filepath")
                with gr.Row():
                    reads, forgets = gr.Button("Read", variant="primary", elem_id="read"), gr.Button("Forget")
            with gr.Column():
                shown = gr.HTML(elem_id="memory")
                question = gr.Textbox(label="Question", elem_id="question")
                asks = gr.Button("Ask", variant="primary", elem_id="ask")
                slept = gr.Textbox(label="After sleep, from its memory", elem_id="slept")
                plain = gr.Textbox(label="Without sleep: it sees the end of the text alone", elem_id="plain")
                downloads, memory = gr.Button("Download the memory"), gr.File(label="Memory")
        alone = {"concurrency_limit": 1, "concurrency_id": "model"}
        reads.click(read, [session, text, file], [session, shown, seen], **alone)
        asks.click(ask, [session, question, seen], [slept, plain], **alone)
        forgets.click(forget, [session], [session, shown, seen])
        downloads.click(download, [session], [memory])
    return blocks


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--window-size", type=int, help="in tokens; by default the checkpoint's, of a base 512")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args()
    asked = None if options.window_size is None else {"window_size": options.window_size}
    loaded = AutoModelForSleepLM.from_pretrained(options.model, sleep=asked)
    page(loaded, tokenizer_of(options.model, loaded)).launch(server_port=options.port)
