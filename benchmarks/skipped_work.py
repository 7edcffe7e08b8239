"""How much of a slept window nobody wants: with what the engine leaves out, and without leaving it out, in turn.

    python benchmarks/skipped_work.py --model .demo/SmolLM2-135M-Instruct

Four windows that sleep and one that is answered in, hard eviction, the library's default loop and blocks; the base is
frozen in training, and the loss is on the last window. FLOPs are torch's count of matrix products, which leaves
attention's own kernels out. Times are medians over turns, in one thread. Outputs and gradients are the same to the bit
(tests/test_laws_skipped.py).
"""

import argparse
import json
import statistics
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_sleep import SleepConfig, SleepForCausalLM
from hf_sleep.engine import Eviction
from hf_sleep.sleep import Sleeper
from hf_sleep.training import freeze_all_but_fast_weights


@contextmanager
def nothing_skipped():
    """As before anything was left out but what a second pass does again."""

    def wanted(self, memory, span, policy):
        can_wait = span.sleeps_next and policy.at_least > 1 and not span.is_wanted
        return self.order.up_to_loop if can_wait else self.order.all

    with (
        mock.patch.object(Sleeper, "_wanted_now", wanted),
        mock.patch.object(Eviction, "drops_window", return_value=False),
        mock.patch("hf_sleep.engine.slots._passing_no_gradient", return_value=0),
    ):
        yield


def works(model, ids, labels):
    def read(passes):
        with torch.no_grad():
            model.eval()(ids, logits_to_keep=1, sleep_passes=passes)

    def step(passes, checkpointing):
        model.gradient_checkpointing = checkpointing
        model.train()(ids, labels=labels, sleep_passes=passes).loss.backward()
        model.zero_grad()

    for passes in (1, 2, 4):
        yield f"read, N = {passes}", lambda n=passes: read(n)
    for passes in (1, 2, 4):
        yield f"training step, N = {passes}", lambda n=passes: step(n, False)
    yield "training step, N = 2, checkpointing", lambda: step(2, True)


def cost(work, turns):
    """FLOPs and seconds of `work`, (with, without) what is left out."""
    flops, seconds = [], ([], [])
    for how in (nullcontext, nothing_skipped):
        with how(), FlopCounterMode(display=False) as counter:
            work()
        flops.append(counter.get_total_flops())
    for _ in range(turns):
        for how, times in zip((nullcontext, nothing_skipped), seconds, strict=True):
            with how():
                began = time.perf_counter()
                work()
                times.append(time.perf_counter() - began)
    return flops, [statistics.median(times) for times in seconds]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; by default a small random one")
    parser.add_argument("--window-size", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path, help="raw JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.model:
        base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    else:
        base = LlamaForCausalLM(
            LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=12)
        )
    model = SleepForCausalLM.from_base(base, SleepConfig(window_size=options.window_size))
    for block in model.fast_weights.values():
        torch.nn.init.normal_(block.mixer.o_proj.weight, std=0.02)
    freeze_all_but_fast_weights(model)
    ids = torch.randint(3, 512, (1, 4 * options.window_size + 32))
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 4 * options.window_size, -100)
    rows = {}
    print(f"loop {model.config.sleep.loop_layers}, blocks after {model.config.sleep.block_layers}\n")
    print("| | FLOPs left | time left |\n|---|---|---|")
    for name, work in works(model, ids, labels):
        flops, seconds = cost(work, options.turns)
        rows[name] = {"flops": flops, "seconds": seconds}
        print(f"| {name} | {flops[0] / flops[1]:.2f} | {seconds[0] / seconds[1]:.2f} |", flush=True)
    if options.output:
        options.output.write_text(json.dumps(vars(options) | {"output": None, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
