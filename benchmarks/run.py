"""Costs and savings of sleep, as ratios of medians of one run: make bench

Decoding and reading are timed on SmolLM2-135M-Instruct, as `make demo` unpacked it, or on --model, any id or folder.
The timed things take turns, so that a drift of the machine's speed hits all of them. Memory in training is counted
exactly, tensor by tensor; the speed of training is training.py's. At the end a table of what people would use instead
(peers.py, which measures more of it).
"""

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import bench_ops
import peers
import torch
from report import Report, console, in_turn
from training import training
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from hf_sleep import SleepCache, SleepConfig, SleepForCausalLM, default_dtype
from hf_sleep.bases.decoder import Decoder
from hf_sleep.cli.measure import TensorBytes
from hf_sleep.cli.readers import cache_bytes
from hf_sleep.compat import CACHE

WINDOW = 512


def reading_and_decoding(model: SleepForCausalLM, report: Report, far: int, steps: int) -> None:
    """Measure reading `far` tokens, then decoding after them, beside the bare base."""
    base, half = model.lm, WINDOW // 2
    ids = torch.randint(3, model.config.text_config.vocab_size, (1, far + half + steps))
    prompt = ids[:, : far + half]
    full, asleep, near = DynamicCache(config=base.config), SleepCache(), SleepCache()
    model(ids[:, :WINDOW], logits_to_keep=1, sleep_passes=1)
    base(ids[:, :WINDOW], logits_to_keep=1)
    ours, theirs = in_turn(
        [
            lambda: model(prompt, cache=asleep, logits_to_keep=1, sleep_passes=1),
            lambda: base(prompt, use_cache=True, logits_to_keep=1, **{CACHE: full}),
        ],
        turns=1,
    )
    count = prompt.shape[1]
    report.add(
        f"tokens/s reading {count:,} tokens, N = 1 ÷ the base's prefill",
        theirs / ours,
        ">=",
        1.0,
        f"{count / ours:.0f}/s, {count / theirs:.0f}/s",
    )
    report.add(
        f"bytes of cache after {count:,} tokens, base ÷ sleeping (all it holds)",
        cache_bytes(full) / asleep.num_bytes(),
        ">=",
        10.0,
        f"{cache_bytes(full) / 1e6:.1f} MB, {asleep.num_bytes() / 1e6:.1f} MB",
    )
    model(ids[:, : WINDOW + half], cache=near, logits_to_keep=1, sleep_passes=1)
    same = DynamicCache(config=base.config)
    base(ids[:, :half], use_cache=True, logits_to_keep=1, **{CACHE: same})

    token = iter(itertools.cycle(ids[:, -steps:].split(1, dim=1)))
    after_near, after_far, bare, bare_full = in_turn(
        [
            lambda: model(next(token), cache=near),
            lambda: model(next(token), cache=asleep),
            lambda: base(next(token), use_cache=True, **{CACHE: same}),
            lambda: base(next(token), use_cache=True, **{CACHE: full}),
        ],
        turns=steps,
    )
    ms = f"{after_far * 1e3:.1f} ms"
    report.add(
        f"decode after {count:,} ÷ after {WINDOW + half}",
        after_far / after_near,
        "<=",
        1.05,
        f"{ms}, {after_near * 1e3:.1f} ms",
    )
    report.add(
        "decode ÷ bare base, same physical context",
        after_near / bare,
        "<=",
        1.08,
        f"{after_near * 1e3:.1f} ms, {bare * 1e3:.1f} ms",
    )
    report.add(
        f"bare base with {count:,} tokens of cache ÷ decode",
        bare_full / after_far,
        ">=",
        2.0,
        f"{bare_full * 1e3:.1f} ms, {ms}",
    )


def passes(model: SleepForCausalLM, report: Report, turns: int) -> None:
    """Measure what N passes over all layers cost, reading windows that all sleep."""
    ids = torch.randint(3, model.config.text_config.vocab_size, (1, 4 * WINDOW + 1))

    def reading(n: int) -> Callable[[], object]:
        return lambda: model(ids, logits_to_keep=1, sleep_passes=n)

    once, twice, four = in_turn([reading(1), reading(2), reading(4)], turns)
    for n, took in ((2, twice), (4, four)):
        report.add(
            f"reading with N = {n} ÷ {n} × N = 1",
            took / (n * once),
            "<=",
            1.05,
            f"{took:.2f} s, {once:.2f} s, 4 windows",
        )


def decoded_window(model: SleepForCausalLM, report: Report, turns: int) -> None:
    """Sleep on a window that was filled token by token: N - 1 passes."""
    ids = torch.randint(3, model.config.text_config.vocab_size, (1, WINDOW))
    cache = SleepCache()
    model(ids[:, :-32], cache=cache, logits_to_keep=1)
    for token in ids[:, -32:].split(1, dim=1):
        model(token, cache=cache)
    layers = model.config.text_config.num_hidden_layers
    for n in (1, 4):
        with mock.patch.object(Decoder, "attention_layer", autospec=True, side_effect=Decoder.attention_layer) as calls:
            model.sleep(cache.fork(), sleep_passes=n)
        report.add(
            f"passes run by a sleep of a decoded window, N = {n}", calls.call_count / layers, "<=", n - 1, "counted"
        )
    read, slept = in_turn(
        [lambda: model(ids, logits_to_keep=1), lambda: model.sleep(cache.fork(), sleep_passes=4)], turns
    )
    report.add(
        "sleep of a decoded window, N = 4 ÷ 3 reads of a window",
        slept / (3 * read),
        "<=",
        1.05,
        f"{slept:.2f} s, {read:.2f} s",
    )


def operators(report: Report, quick: bool) -> None:
    """The chunked gated delta rule beside transformers' torch fallback."""
    bench_ops.header()
    rows = bench_ops.in_this_process(quick)
    for part in bench_ops.PARTS:
        values = [row[part]["ratio"] for row in rows]
        windows = [row[part]["ratio"] for row in rows if 64 <= row["T"] <= 256]
        report.add(
            f"gated delta rule ÷ transformers, {part}, worst",
            max(values),
            "<=",
            1.0,
            f"{len(values)} sizes, median {statistics.median(values):.2f}",
        )
        report.add(
            f"    median for 64-256 tokens, {part}", statistics.median(windows), "<=", 0.99, f"{len(windows)} sizes"
        )


def training_memory(report: Report) -> None:
    """Peak bytes of tensors in a training step over more and more windows, N = 2, labels in the last window."""
    rows, window, width = 8, 128, 256
    config = LlamaConfig(
        hidden_size=width, intermediate_size=688, num_hidden_layers=8, num_attention_heads=4, vocab_size=256
    )
    sleep = SleepConfig(window_size=window, sleep_passes=2, num_blocks=2, loop_layers=(0, 8))
    model = SleepForCausalLM.from_base(LlamaForCausalLM(config), sleep).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def peak(windows: int, checkpointing: bool) -> int:
        model.gradient_checkpointing = checkpointing
        ids = torch.randint(0, 256, (rows, window * windows))
        labels = torch.where(torch.arange(ids.shape[1]) < window * (windows - 1), -100, ids)
        with TensorBytes() as counted:
            model(ids, labels=labels).loss.backward()
        return counted.peak

    cache = SleepCache()
    with torch.no_grad():
        model(torch.zeros(rows, 1, dtype=torch.long), cache=cache)
    hidden = rows * window * width * 4
    one, sixteen = peak(1, True), peak(16, True)
    plain = (peak(5, False) - peak(1, False)) / 4
    growth = (sixteen - one) / 15
    allowed = cache.fast_weight_bytes() + 2 * hidden
    report.add(
        "training memory per further window, checkpointing ÷ without",
        growth / plain,
        "<=",
        0.05,
        f"{growth / 1e6:.1f} MB, {plain / 1e6:.1f} MB",
    )
    report.add(
        "peak over 16 windows, checkpointing ÷ (peak over 2 + 14 states and passes' inputs)",
        sixteen / (peak(2, True) + 14 * allowed),
        "<=",
        1.1,
        f"{sixteen / 1e6:.0f} MB; one state and two inputs are {allowed / 1e6:.1f} MB",
    )


def load(source: str | None, dtype: str) -> PreTrainedModel:
    folder = source or ".demo/SmolLM2-135M-Instruct"
    if source is None and not Path(folder).is_dir():
        raise SystemExit(f"{folder} is missing: run `make demo` once, or pass --model with a Hub id or folder")
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder (default: the SmolLM2 that make demo unpacked)")
    native = str(default_dtype("cpu")).removeprefix("torch.")
    parser.add_argument("--dtype", default=native, help="of the model (default here: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16384, help="how far to read (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer tokens and turns, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    arguments = parser.parse_args()
    report, turns = Report(), 1 if arguments.quick else 3
    torch.manual_seed(0)
    base = load(arguments.model, arguments.dtype)
    every_layer = (0, base.config.num_hidden_layers)
    model = SleepForCausalLM.from_base(base, SleepConfig(window_size=WINDOW, num_blocks=6, loop_layers=every_layer))
    console.print(
        f"{os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads, {model.dtype}"
    )
    with torch.inference_mode():
        reading_and_decoding(model, report, 1024 if arguments.quick else arguments.tokens, 8 if arguments.quick else 96)
        passes(model, report, turns)
        decoded_window(model, report, turns)
    operators(report, arguments.quick)
    training_memory(report)
    training(report, arguments.quick)
    console.print(report.table())
    if arguments.json:
        arguments.json.write_text(json.dumps(report.rows, indent=1), encoding="utf-8")
    peers.in_short(base, arguments.quick)


if __name__ == "__main__":
    main()
