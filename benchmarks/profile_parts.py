"""Shares of time: what reading, decoding, sleeping and a training step spend it on.

    python benchmarks/profile_parts.py [--model FOLDER | --small] [--threads 1 2] [--output FILE]
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/profile_parts.py    # as without AVX-512

torch's profiler says how long each operator took by itself; what is left of the time on the clock is Python and the
calls between operators. The profiler slows operators down, the small ones most: times on the clock are taken without
it, and its shares are of the operators' sum.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_sleep import SleepCache, SleepConfig, SleepForCausalLM, default_dtype
from hf_sleep.training import freeze_all_but_fast_weights

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul", "aten::mkldnn_linear"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "rule and convolution": ("aten::bmm", "aten::baddbmm", "aten::linalg", "aten::triangular", "_Chunked", "_Conv"),
    "copies": ("aten::copy", "aten::fill", "aten::cat", "aten::zero", "aten::clone", "aten::index", "aten::gather"),
    "views": (
        *("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::transpose", "aten::permute", "aten::as_strided"),
        *("aten::slice", "aten::select", "aten::split", "aten::unbind", "aten::chunk", "aten::narrow", "aten::alias"),
        *("aten::expand", "aten::squeeze", "aten::unsqueeze", "aten::flatten", "aten::unflatten"),
    ),
    "elementwise and sums": (
        *("aten::mul", "aten::add", "aten::sub", "aten::div", "aten::neg", "aten::pow", "aten::rsqrt", "aten::sum"),
        *("aten::silu", "aten::sigmoid", "aten::softplus", "aten::exp", "aten::mean", "aten::where", "aten::norm"),
    ),
}
"""Operators by the beginning of their names, the first that fits."""
ALL_ELSE = "all else"


def shares(profiler: profile) -> dict[str, float]:
    """What part of the operators' own time each kind took, the largest first."""
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), ALL_ELSE)
        spent[kind] += event.self_cpu_time_total
    return {kind: took / spent.total() for kind, took in spent.most_common()}


def tasks(model: SleepForCausalLM, size: int) -> dict[str, Callable[[], object]]:
    """What is measured, each a call of a few hundred tokens or fewer."""
    ids = torch.randint(3, model.config.text_config.vocab_size, (1, 4 * size + size // 2))
    cache, full = SleepCache(), SleepCache()

    def read() -> object:
        with torch.no_grad():
            return model(ids[:, : size + 1], logits_to_keep=1, sleep_passes=1)

    def decode() -> object:
        with torch.no_grad():
            return model(ids[:, :1], cache=cache.fork())

    def sleep() -> object:
        with torch.no_grad():
            return model.sleep(full.fork(), 2)

    def train() -> object:
        model.train()
        labels = torch.full_like(ids, -100)
        labels[:, 4 * size :] = ids[:, 4 * size :]
        model(ids, labels=labels, sleep_passes=2).loss.backward()
        model.zero_grad()
        return model.eval()

    with torch.no_grad():
        model(ids[:, : size + size // 2], cache=cache)
        model(ids[:, :size], cache=full)
    return {
        "read a window": read,
        "decode a token": decode,
        "a second pass": sleep,
        "training step, N = 2, 4 windows": train,
    }


def measure(task: Callable[[], object], turns: int) -> dict:
    task()
    took = []
    for _ in range(turns):
        start = time.perf_counter()
        task()
        took.append(time.perf_counter() - start)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(turns):
            task()
    calls = sum(event.count for event in profiler.key_averages()) / turns
    return {"milliseconds": 1e3 * statistics.median(took), "operators": calls, "shares": shares(profiler)}


def make_model(options: argparse.Namespace) -> tuple[SleepForCausalLM, int]:
    if options.small:
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
        base, size = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)), 64
    else:
        base, size = AutoModelForCausalLM.from_pretrained(options.model, dtype=default_dtype("cpu")), 256
    model = SleepForCausalLM.from_base(base.eval(), SleepConfig(window_size=size, num_blocks=options.blocks)).eval()
    freeze_all_but_fast_weights(model)
    return model, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".demo/SmolLM2-135M-Instruct", help="Hub id or folder of a base")
    parser.add_argument("--small", action="store_true", help="a random Llama of 8 layers of 128 channels instead")
    parser.add_argument("--blocks", type=int, default=6, help="new blocks")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    model, size = make_model(options)
    found: dict = {"model": "small" if options.small else options.model, "dtype": str(model.dtype), "window_size": size}
    found["cpu"] = torch.backends.cpu.get_cpu_capability()
    table = Table(title=f"{found['model']}, {found['dtype']}, L = {size}, {found['cpu']}")
    for column in ("threads", "what", "ms", "operators", *KINDS, ALL_ELSE):
        table.add_column(column)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name, task in tasks(model, size).items():
            found[f"{name}, threads {threads}"] = one = measure(task, options.turns)
            cells = [f"{one['shares'].get(kind, 0.0):.0%}" for kind in (*KINDS, ALL_ELSE)]
            table.add_row(str(threads), name, f"{one['milliseconds']:.1f}", f"{one['operators']:.0f}", *cells)
    Console(width=150).print(table)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
