"""Whether a change made anything slower: two checkouts in turn, in one run.

    python benchmarks/two_checkouts.py ../before . --model FOLDER

Each checkout works in a process of its own, with one thread; the two take turns, so that a drift of the machine's speed
hits both. Two processes of one checkout differ by several percent, so there are several pairs of them. Printed is the
second's time over the first's: of each pair the median over turns, of these the median, and the smallest and largest.
The same checkout twice shows what the machine can tell apart.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

WORK = {
    "decode a token": ("decode", 24),
    "read 4 windows, N = 2": ("read", 1),
    "a training step, N = 2": ("step", 1),
}


def worker(model_path: str, is_small: bool) -> None:
    """Do what the lines of stdin name, and answer with the seconds that one repetition took."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from hf_sleep import SleepCache, SleepConfig, SleepForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if is_small:
        config = LlamaConfig(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=8)
        config.num_attention_heads = config.num_key_value_heads = 4
        base, window = LlamaForCausalLM(config), 32
    else:
        base, window = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32), 128
    model = SleepForCausalLM.from_base(base.eval(), SleepConfig(window_size=window, sleep_passes=2))
    ids = torch.randint(3, 512, (1, 4 * window + 1))
    cache, batch = SleepCache(), ids[:, : 2 * window + 1]

    def decode() -> None:
        with torch.no_grad():
            model(ids[:, :1], cache=cache)

    def read() -> None:
        with torch.no_grad():
            model(ids, logits_to_keep=1)

    def step() -> None:
        model.train()
        model(batch, labels=batch).loss.backward()
        model.zero_grad()
        model.eval()

    with torch.no_grad():
        model(ids, cache=cache)
    for line in sys.stdin:
        name, repetitions = json.loads(line)
        began = time.perf_counter()
        for _ in range(repetitions):
            {"decode": decode, "read": read, "step": step}[name]()
        print(json.dumps((time.perf_counter() - began) / repetitions), flush=True)


def start(checkout: Path, arguments: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", __file__, "--worker", "--model", arguments.model]
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if arguments.small:
        command.append("--small")
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(process: subprocess.Popen, name: str, repetitions: int) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([name, repetitions]) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, help="before, and after")
    parser.add_argument("--model", default="", help="id or folder of a base; with --small none is needed")
    parser.add_argument("--small", action="store_true", help="a random model of 8 layers, on which overhead shows")
    parser.add_argument("--turns", type=int, default=10, help="of a pair of processes")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of processes")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.model, arguments.small)
        return
    ratios: dict[str, list[float]] = {what: [] for what in WORK}
    seconds: dict[str, list[float]] = {what: [] for what in WORK}
    for round in range(arguments.rounds):
        before, after = (start(checkout, arguments) for checkout in arguments.checkouts)
        for what, (name, repetitions) in WORK.items():
            pairs = []
            for turn in range(arguments.turns + 2):
                order = [before, after]
                random.Random(f"{round}/{turn}").shuffle(order)
                took = {process: ask(process, name, repetitions) for process in order}
                pairs.append((took[after], took[before]))
            # The first two warm up. A round counts once: its turns share what its two processes happened to get.
            ratios[what].append(statistics.median(new / old for new, old in pairs[2:]))
            seconds[what].append(statistics.median(old for _, old in pairs[2:]))
        for process in (before, after):
            process.terminate()
    for what, of in ratios.items():
        spread = f"{min(of):.3f} to {max(of):.3f} over {len(of)} pairs of processes"
        print(f"{what}: {statistics.median(of):.3f} ({spread}; before {statistics.median(seconds[what]) * 1e3:.1f} ms)")


if __name__ == "__main__":
    main()
