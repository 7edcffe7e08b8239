"""Share a memory: it is saved by one process, loaded by another, and answers there with the same tokens.

.venv/bin/python examples/share_memory.py                                           # after `make demo`
.venv/bin/python examples/share_memory.py --load report.sleep                       # what somebody sent
"""

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoTokenizer

from hf_sleep import AutoModelForSleepLM, SleepSession

TEXT = "The night train from Ostrava leaves at ten, from platform three. Dogs need a ticket of their own. " * 12
QUESTION = "When does the night train leave?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".demo/SmolLM2-135M-Instruct", help="a folder or Hub id")
    parser.add_argument("--window-size", type=int, default=128, help="tokens between two sleeps")
    parser.add_argument("--load", type=Path, help="a memory that was saved, with this model and window size")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSleepLM.from_pretrained(arguments.model, sleep={"window_size": arguments.window_size})
    if arguments.load:
        memory = SleepSession.load(arguments.load, model, tokenizer)
        print(repr(memory.ask(QUESTION, max_new_tokens=24, do_sample=False)))
        return

    memory = SleepSession(model, tokenizer)
    memory.read(TEXT, title="timetable", progress=False)
    answer = repr(memory.ask(QUESTION, max_new_tokens=24, do_sample=False))
    with TemporaryDirectory() as folder:
        file = Path(folder) / "timetable.sleep"
        memory.save(file)
        report = memory.report()
        print(f"{report.tokens} tokens, {report.sleeps} sleeps: a file of {file.stat().st_size / 1e6:.1f} MB")
        same = ["--model", arguments.model, "--window-size", str(arguments.window_size)]
        command = [sys.executable, __file__, "--load", str(file), *same]
        other = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(f"here:               {answer}\nin another process: {other.stdout.strip()}")
    if other.stdout.strip() != answer:
        raise SystemExit("they differ")


if __name__ == "__main__":
    main()
