"""A tiny model that speaks letters, and servers of it in threads of the tests."""

import socket
import threading
import time
from contextlib import contextmanager

import openai
import torch
import uvicorn
from families import VOCAB, make_model, sleep_config
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_sleep.serve.app import create_app
from hf_sleep.serve.settings import LOCAL_NAMES, ServeSettings

SPECIAL = ["<eos>", "<system>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NAME, WINDOW = "tiny", 24


def letters() -> PreTrainedTokenizerFast:
    """A token per letter, and a chat template."""
    alphabet = "?Ġabcdefghijklmnopqrstuvwxyz.,ABCDEFGHIJKLMNOPQRSTUVWXYZ0123"[: VOCAB - len(SPECIAL)]
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, [], unk_token="?"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="?", unk_token="?", eos_token="<eos>")
    made.chat_template = TEMPLATE
    return made


def tiny(dtype=torch.float32, **fields):
    """A model whose fast weights matter; the same each time."""
    settings = {"window_size": WINDOW, "sleep_passes": 2, "eviction": "hard"} | fields
    model = make_model("llama", sleep_config("llama", **settings), dtype)
    model.generation_config.eos_token_id = None
    # What it says are letters, which are read again as they were said.
    model.generation_config.suppress_tokens = [0, 1, *range(VOCAB - len(SPECIAL), VOCAB)]
    return model


@contextmanager
def served(model=None, **settings):
    """A server on a free port; gives its URL, and the application."""
    settings = {"name": NAME, "hosts": LOCAL_NAMES, "max_tokens": 64} | settings
    app = create_app(tiny() if model is None else model, letters(), ServeSettings(**settings))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [free]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{free.getsockname()[1]}", app
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def client(url: str, token: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0)
