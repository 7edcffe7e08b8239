"""Mixed work of many sessions for as long as asked, and whether memory stays flat.

    python benchmarks/soak.py --minutes 60 --output docs/results/soak.json

A tiny model; sessions that read, ask, chat, sleep, undo, roll back, fork, forget, are saved and loaded, share a store
of bounded size, and answer in batches. The resident set is noted every --every seconds; after the first fifth of the
time it must not grow by more than --growth.
"""

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_sleep import SessionBatch, SleepConfig, SleepForCausalLM, SleepSession, SleepStore

WORDS = 500


def tiny() -> tuple[SleepForCausalLM, PreTrainedTokenizerFast]:
    names = ["<end>", *(f"w{i}" for i in range(1, WORDS))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = SleepForCausalLM.from_base(LlamaForCausalLM(config).eval(), SleepConfig(window_size=64))
    return model, PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w1", eos_token="<end>")


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def some_words(draw: random.Random, most: int) -> str:
    return " ".join(f"w{draw.randrange(1, WORDS)}" for _ in range(draw.randrange(1, most)))


def work(draw: random.Random, sessions: list[SleepSession], folder: Path, batch: SessionBatch) -> str:
    """One thing that people do."""
    i = draw.randrange(len(sessions))
    session, path, how = sessions[i], folder / f"{i}.sleep", {"max_new_tokens": draw.randrange(1, 24)}
    what = draw.choice(("read", "read", "ask", "many", "chat", "sleep", "back", "fork", "forget", "file", "batch"))
    if what == "read":
        session.read(some_words(draw, 300), progress=False)
    elif what == "ask":
        session.ask(some_words(draw, 8), **how)
    elif what == "many":
        session.ask_many([some_words(draw, 8) for _ in range(4)], **how)
    elif what == "chat":
        session.chat(some_words(draw, 8), **how)
        session.undo()
    elif what == "sleep":
        session.sleep()
    elif what == "back":
        session.read(some_words(draw, 100), then_sleep=True, progress=False)
        session.chat(some_words(draw, 8), **how)
        session.rollback()
    elif what == "fork":
        session.fork().read(some_words(draw, 100), progress=False)
    elif what == "forget":
        session.forget()
    elif what == "file" and session.report().tokens:
        session.save(path)
        sessions[i] = SleepSession.load(path, session.model, session.tokenizer, store=session.steps.store)
    elif what == "batch":
        for other in sessions:
            batch.submit(other, some_words(draw, 8), **how)
        batch.run()
    return what


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--sessions", type=int, default=12)
    parser.add_argument("--every", type=float, default=10.0, help="seconds")
    parser.add_argument("--growth", type=float, default=0.05, help="share of the resident set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = tiny()
    draw, done, sizes = random.Random(options.seed), {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, batch = SleepStore(folder / "store", max_bytes=20_000_000), SessionBatch(model, max_rows=8)
        sessions = [SleepSession(model, tokenizer, store=store) for _ in range(options.sessions)]
        began = noted = time.monotonic()
        while time.monotonic() - began < 60 * options.minutes:
            what = work(draw, sessions, folder, batch)
            done[what] = done.get(what, 0) + 1
            if time.monotonic() - noted > options.every:
                noted = time.monotonic()
                sizes.append((round(noted - began), resident()))
    settled = [size for seconds, size in sizes if seconds > 12 * options.minutes]
    fifth = max(1, len(settled) // 5)
    first, last = (sum(part) / len(part) for part in (settled[:fifth], settled[-fifth:]))
    found = {"minutes": options.minutes, "done": done, "resident MB": [[s, round(b / 1e6, 1)] for s, b in sizes]}
    found |= {"growth": round(last / first - 1, 4), "torch": torch.__version__}
    print(json.dumps(found))
    if options.output is not None:
        options.output.write_text(json.dumps(found) + "\n", encoding="utf-8")
    if last > (1 + options.growth) * first:
        raise SystemExit(f"the resident set grew from {first / 1e6:.1f} to {last / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
