"""A chat in the terminal: it may go on for as long as you like, in bounded memory.

.venv/bin/python examples/chat.py                                                   # after `make demo`

/read FILE, /sleep, /undo, /forget, /report; an empty line ends it. `hf-sleep chat` does more.
"""

import argparse
from contextlib import suppress
from pathlib import Path

from transformers import AutoTokenizer

from hf_sleep import AutoModelForSleepLM, SleepSession


def obey(memory: SleepSession, command: str, argument: str) -> None:
    """Do what a line with a slash says."""
    match command:
        case "/read":
            print(f"{memory.read(Path(argument))} tokens")
        case "/sleep" | "/undo" | "/forget":
            getattr(memory, command[1:])()
            print(memory)
        case "/report":
            print(memory.report())
        case _:
            print("/read FILE, /sleep, /undo, /forget, /report")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".demo/SmolLM2-135M-Instruct", help="a folder or Hub id")
    parser.add_argument("--window-size", type=int, default=512, help="tokens between two sleeps")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of an answer")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSleepLM.from_pretrained(arguments.model, sleep={"window_size": arguments.window_size})
    memory = SleepSession(model, tokenizer)
    memory.sleep_when_idle(5)
    while line := input("> ").strip():
        command, _, argument = line.partition(" ")
        try:
            if command.startswith("/"):
                obey(memory, command, argument)
                continue
            for piece in memory.stream(line, remember=True, max_new_tokens=arguments.max_new_tokens):
                print(piece, end="", flush=True)
            print()
        except (ValueError, OSError) as error:
            print(error)


if __name__ == "__main__":
    with suppress(EOFError, KeyboardInterrupt):
        main()
