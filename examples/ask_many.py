"""Consolidate once, ask many: the context is read and slept on once for all questions, which are answered as a batch.

.venv/bin/python examples/ask_many.py                                               # after `make demo`
.venv/bin/python examples/ask_many.py --tokens 8000 --questions 16 --again 16       # minutes on a CPU
"""

import argparse
import pydoc_data.topics
import time

from transformers import AutoTokenizer

from hf_sleep import AutoModelForSleepLM, SleepSession


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".demo/SmolLM2-135M-Instruct", help="a folder or Hub id")
    parser.add_argument("--tokens", type=int, default=768, help="of the context")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument(
        "--again", type=int, default=2, help="questions for which the context is read again, to compare"
    )
    parser.add_argument("--window-size", type=int, default=256, help="tokens between two sleeps")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSleepLM.from_pretrained(arguments.model, sleep={"window_size": arguments.window_size})
    context = tokenizer("\n".join(pydoc_data.topics.topics.values()), verbose=False).input_ids[: arguments.tokens]
    questions = [f"What is {n} plus {n}?" for n in range(arguments.questions)]
    how = {"max_new_tokens": 4, "do_sample": False}

    def read() -> SleepSession:
        memory = SleepSession(model, tokenizer)
        memory.read(context, then_sleep=True, progress=False)
        return memory

    began = time.perf_counter()
    answers = read().ask_many(questions, **how)
    once = (time.perf_counter() - began) / len(questions)

    began = time.perf_counter()
    alone = [read().ask(question, **how) for question in questions[: arguments.again]]
    again = (time.perf_counter() - began) / len(alone)

    for question, answer in zip(questions, answers, strict=True):
        print(f"{question} {answer}")
    print(f"\n{len(context):,} tokens read once for {len(questions)} questions: {once:.2f} s per question")
    print(f"read again for each question ({len(alone)} measured): {again:.2f} s per question")
    print(f"{again / once:.1f} times as fast; the same answers: {alone == answers[: len(alone)]}")


if __name__ == "__main__":
    main()
