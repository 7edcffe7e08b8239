"""What a memory saves: one reading for many questions, a beginning that was read before, many sessions in one batch.

    python benchmarks/memories.py --model .demo/SmolLM2-135M-Instruct --output docs/results/memories.json

Ratios of one run, in one thread by default, greedy answers of --answer tokens. Reading for each question is measured
for two questions, and counted as often as there are questions.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from hf_sleep import AutoModelForSleepLM, SessionBatch, SleepConfig, SleepSession, SleepStore

TEXT = "The {i}th letter came on a {day}, and it said that the {thing} near the old mill would be sold before autumn. "
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
THINGS = ("garden", "barn", "orchard", "boat", "bridge")


def text_of(tokenizer, count: int, seed: int = 0) -> list[int]:
    """Ids of plain sentences."""
    ids, i = [], seed
    while len(ids) < count:
        ids += tokenizer(TEXT.format(i=i, day=DAYS[i % 7], thing=THINGS[i % 5]), add_special_tokens=False).input_ids
        i += 1
    return ids[:count]


def timed(work) -> tuple[float, object]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def one_reading_for_many(model, tokenizer, options) -> dict:
    """`ask_many` after one reading, against reading for each question."""
    ids = text_of(tokenizer, options.tokens)
    questions = [f"What came on a {DAYS[i % 7]}, in letter {i}?" for i in range(options.questions)]
    how = {"max_new_tokens": options.answer, "min_new_tokens": options.answer, "do_sample": False}
    session = SleepSession(model, tokenizer)
    reading, _ = timed(lambda: session.read(ids, progress=False))
    asking, together = timed(lambda: session.ask_many(questions, **how))

    def alone(question):
        fresh = SleepSession(model, tokenizer)
        fresh.read(ids, progress=False)
        return fresh.ask(question, **how)

    each, first = timed(lambda: [alone(question) for question in questions[:2]])
    every = each / 2 * len(questions)
    return {
        "tokens": len(ids),
        "questions": len(questions),
        "seconds, read once and ask_many": round(reading + asking, 2),
        "of these, asking": round(asking, 2),
        "seconds, read for each": round(every, 2),
        "ratio": round(every / (reading + asking), 2),
        "answers alike": f"{sum(a == b for a, b in zip(first, together[:2], strict=True))} of 2",
        "num_bytes": session.report().num_bytes,
    }


def a_known_beginning(model, tokenizer, options) -> dict:
    """Time to the first token of an answer about a text, with and without a store that knows its beginning."""
    ids, folder = text_of(tokenizer, options.tokens + 40), tempfile.mkdtemp()
    seconds = {}
    for name in ("unknown", "known"):
        session = SleepSession(model, tokenizer, store=SleepStore(folder))

        def first_token(session=session):
            session.read(ids, progress=False)
            return session.ask("What came first?", max_new_tokens=1, do_sample=False)

        seconds[name], _ = timed(first_token)
    size = SleepStore(folder).num_bytes()
    shutil.rmtree(folder)
    return {
        "tokens": len(ids),
        "seconds to the first token, unknown": round(seconds["unknown"], 2),
        "known": round(seconds["known"], 3),
        "ratio": round(seconds["unknown"] / seconds["known"], 1),
        "bytes in the store": size,
    }


def many_sessions(model, tokenizer, options, count: int) -> dict:
    """Answer tokens per second of sessions in one batch, against one after the other."""
    sessions = []
    for i in range(count):
        session = SleepSession(model, tokenizer, sleep_before_turns="never")
        session.read(text_of(tokenizer, 20 + 7 * i, seed=i), progress=False)
        sessions.append(session)
    how = {"max_new_tokens": options.batch_answer, "min_new_tokens": options.batch_answer, "do_sample": False}
    one, alone = timed(lambda: [session.ask("What came first?", **how) for session in sessions])
    batch = SessionBatch(model, max_rows=count)

    def together():
        answers = [batch.submit(session, "What came first?", **how) for session in sessions]
        batch.run()
        return [answer.result(0) for answer in answers]

    all_at_once, said = timed(together)
    tokens = count * options.batch_answer
    return {
        "sessions": count,
        "tokens/s, one by one": round(tokens / one, 1),
        "in one batch": round(tokens / all_at_once, 1),
        "ratio": round(one / all_at_once, 2),
        "answers alike": sum(a == b for a, b in zip(said, alone, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".demo/SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--window-size", type=int, default=512)
    parser.add_argument("--sleep-passes", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--answer", type=int, default=16, help="tokens")
    parser.add_argument("--sessions", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--batch-answer", type=int, default=48, help="tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    sleep = SleepConfig(window_size=options.window_size, sleep_passes=options.sleep_passes)
    more = {} if options.dtype is None else {"dtype": options.dtype}
    model = AutoModelForSleepLM.from_pretrained(options.model, sleep=sleep, **more)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    found = {
        "model": options.model,
        "dtype": str(model.dtype),
        "threads": options.threads,
        "torch": torch.__version__,
        "one reading for many questions": one_reading_for_many(model, tokenizer, options),
        "a beginning that was read before": a_known_beginning(model, tokenizer, options),
        "sessions in a batch": [many_sessions(model, tokenizer, options, count) for count in options.sessions],
    }
    text = json.dumps(found, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
