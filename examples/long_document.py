"""A long document and many questions: it is read once, in bounded memory, and each question is asked of a fork.

.venv/bin/python examples/long_document.py                                          # after `make demo`
.venv/bin/python examples/long_document.py --file contract.txt --question "Who pays for repairs?"
"""

import argparse
import pydoc_data.topics
from pathlib import Path

from transformers import AutoTokenizer

from hf_sleep import AutoModelForSleepLM, SleepSession

QUESTIONS = ["What does the with statement do?", "Name a keyword of Python.", "What is the capital of France?"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".demo/SmolLM2-135M-Instruct", help="a folder or Hub id")
    parser.add_argument("--file", type=Path, help="by default a chapter of Python's language reference")
    parser.add_argument("--question", action="append", help="may be given several times")
    parser.add_argument("--window-size", type=int, default=256, help="tokens between two sleeps")
    parser.add_argument("--sleep-passes", type=int, default=2)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    sleep = {"window_size": arguments.window_size, "sleep_passes": arguments.sleep_passes}
    model = AutoModelForSleepLM.from_pretrained(arguments.model, sleep=sleep)
    memory = SleepSession(model, tokenizer)

    document = arguments.file or pydoc_data.topics.topics["compound"][:4000]
    memory.read(document, title=arguments.file and arguments.file.name)
    before = memory.report()
    print(f"{before.tokens:,} tokens, {before.sleeps} sleeps, {before.num_bytes / 1e6:.2f} MB held")

    questions = arguments.question or QUESTIONS
    for question, answer in zip(questions, memory.ask_many(questions, max_new_tokens=24, do_sample=False), strict=True):
        print(f"\n> {question}\n{answer}")
    if memory.report() == before:
        print(f"\nThe memory is as it was: {before.tokens:,} tokens, of which no question is one.")


if __name__ == "__main__":
    main()
