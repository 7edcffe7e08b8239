"""Prefix reuse: a text whose beginning was read before, by whatever session, continues from a store.

.venv/bin/python examples/prefix_reuse.py                                           # after `make demo`
.venv/bin/python examples/prefix_reuse.py --tokens 8000 --store ~/.cache/sleeps     # any folder or fsspec URL
"""

import argparse
import pydoc_data.topics
import time
from tempfile import TemporaryDirectory

from transformers import AutoTokenizer

from hf_sleep import AutoModelForSleepLM, SleepSession, SleepStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".demo/SmolLM2-135M-Instruct", help="a folder or Hub id")
    parser.add_argument("--tokens", type=int, default=1024, help="of the prefix that two prompts share")
    parser.add_argument("--window-size", type=int, default=256, help="tokens between two sleeps")
    parser.add_argument("--store", help="where windows are kept; by default a folder that is deleted at the end")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSleepLM.from_pretrained(arguments.model, sleep={"window_size": arguments.window_size})
    prefix = tokenizer("\n".join(pydoc_data.topics.topics.values()), verbose=False).input_ids[: arguments.tokens]

    def first_token(store: SleepStore | None, question: str) -> tuple[str, float]:
        """What a fresh session says first, and the seconds until then."""
        began = time.perf_counter()
        memory = SleepSession(model, tokenizer, store=store)
        memory.read(prefix, progress=False)
        said = memory.ask(question, max_new_tokens=1, do_sample=False)
        return said, time.perf_counter() - began

    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        store = SleepStore(arguments.store or folder)
        first_token(store, "What is this?")
        kept = store.num_bytes()
        said, without = first_token(None, "What is the capital of France?")
        again, with_store = first_token(store, "What is the capital of France?")
    print(f"{len(prefix):,} tokens: {kept / 1e6:.1f} MB in the store")
    print(f"first token without it: {without:.2f} s\nwith it:                {with_store:.2f} s")
    print(f"{without / with_store:.1f} times as fast; the same token: {again == said}")


if __name__ == "__main__":
    main()
