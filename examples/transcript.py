"""A transcript as it is spoken: the model sleeps in the pauses, so that nobody waits for it when a question comes.

.venv/bin/python examples/transcript.py                                             # after `make demo`
"""

import argparse
import time

from transformers import AutoTokenizer

from hf_sleep import AutoModelForSleepLM, SleepSession

TRANSCRIPT = """\
ANN: Let us begin with the bridge. The north pier has settled by two millimetres since March.
BO: That is within what we expected. The gauges are read every morning, at seven.
ANN: Who reads them while you are away?
BO: Carla does, until the fourteenth. After that they report by radio, if the mast is up by then.
ANN: Then we postpone the load test to the twentieth. Is there anything about the railing?
BO: The railing is painted. Only the east side, though, because of the rain."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".demo/SmolLM2-135M-Instruct", help="a folder or Hub id")
    parser.add_argument("--window-size", type=int, default=128, help="tokens between two sleeps")
    parser.add_argument("--pause", type=float, default=1.5, help="seconds between two speakers")
    parser.add_argument("--idle", type=float, default=0.3, help="seconds without a word after which the model sleeps")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSleepLM.from_pretrained(arguments.model, sleep={"window_size": arguments.window_size})
    memory = SleepSession(model, tokenizer, system="You take the minutes of a meeting.")
    memory.sleep_when_idle(arguments.idle)
    for line in TRANSCRIPT.splitlines(keepends=True):
        memory.read(line, title=line.partition(":")[0], progress=False)
        print(line.rstrip())
        time.sleep(arguments.pause)
        report = memory.report()
        print(f"    [{report.window_tokens} tokens in the window, {report.sleeps} sleeps]")

    asleep = memory.report().seconds_asleep
    began = time.perf_counter()
    answer = memory.ask("Who reads the gauges?", max_new_tokens=24, do_sample=False)
    print(f"\n> Who reads the gauges?\n{answer}")
    memory.sleep_when_idle(None)
    print(f"\nAnswered in {time.perf_counter() - began:.1f} s; {asleep:.1f} s of sleep came in the pauses.")


if __name__ == "__main__":
    main()
