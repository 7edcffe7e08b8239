"""Costs of training through sleep, beside what they could be: steps are a forward and a backward, no optimizer.

python benchmarks/training.py [--threads N] [--json FILE]   # how a step scales: a table per axis
python benchmarks/training.py --profile                     # where the time of a step goes
python benchmarks/training.py --ratios                      # the rows of `make bench` on training, alone
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from profile_parts import shares
from report import Report, console, in_turn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sleep import SleepConfig, SleepForCausalLM
from hf_sleep.cli.measure import TensorBytes
from hf_sleep.data import GSMInfinite

VOCABULARY = 256
TOLERANCE = 1e-4  # float32


def hybrid(window: int, layers: int) -> SleepForCausalLM:
    """Layers of 256 channels and two Jet blocks that write something, in training."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
    )
    sleep = SleepConfig(window_size=window, num_blocks=2, loop_layers=(0, config.num_hidden_layers))
    model = SleepForCausalLM.from_base(LlamaForCausalLM(config), sleep).train()
    for block in model.fast_weights.values():
        torch.nn.init.normal_(block.mixer.o_proj.weight, std=0.02)
    return model


def stepping(model: SleepForCausalLM, loss: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A training step that starts without gradients and leaves them on the model."""

    def step() -> torch.Tensor:
        model.zero_grad()
        value = loss()
        value.backward()
        return value.detach()

    return step


def asleep(quick: bool) -> tuple[SleepForCausalLM, torch.Tensor, str]:
    """A model, windows that all sleep (the token after them makes the last one), and a word on them."""
    window, windows, rows = 256, 4, 1 if quick else 2
    ids = torch.randint(0, VOCABULARY, (rows, windows * window + 1))
    return hybrid(window, 2 if quick else 8), ids, f"{rows} × {windows} windows of {window}"


def passes(report: Report, quick: bool, turns: int) -> None:
    """Training with N passes; all layers loop."""
    model, ids, what = asleep(quick)

    def step(n: int) -> Callable[[], torch.Tensor]:
        return stepping(model, lambda: model(ids, labels=ids, sleep_passes=n).loss)

    steps = [step(1), step(2), step(4)]
    in_turn(steps, 1)
    once, twice, four = in_turn(steps, turns)
    for n, took in ((2, twice), (4, four)):
        report.add(
            f"training step with N = {n} ÷ {n} × N = 1",
            took / (n * once),
            "<=",
            1.08,
            f"{took:.2f} s, {once:.2f} s; {what}",
        )


def parallel_loss(model: SleepForCausalLM, ids: torch.Tensor, width: int) -> torch.Tensor:
    """The loss of `model` with N = 1 and hard eviction, layer by layer over the whole sequence in one go.

    Args:
        ids: `[B, T]`, whole windows.
        width: tokens that attention is given at once: T with a block-diagonal mask, or L, windows as rows of a batch,
            where causality says it all.
    """
    decoder, window = model.decoder, model.config.sleep.window_size
    x = decoder.embed(ids)
    whole, pieces = x.shape, (-1, width, x.shape[-1])
    token = torch.arange(width)
    rope = decoder.rope(x, token.unsqueeze(0) % window, "full_attention")
    mask = None
    if width > window:
        query, key = token.unsqueeze(1), token
        mask = ((query >= key) & (query // window == key // window))[None, None]
    for index, layer in enumerate(decoder.layers):
        x = layer(x.view(pieces), attention_mask=mask, position_embeddings=rope).view(whole)
        if str(index) in model.fast_weights:
            block = model.fast_weights[str(index)]
            x, _ = block(x, block.empty(len(x), x.device, x.dtype))
    logits = decoder.logits(x)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def difference(model: SleepForCausalLM, one: Callable, other: Callable) -> float:
    """Largest relative difference, in norm, of two steps' losses and of any parameter's gradients.

    Raises:
        RuntimeError: more than float32 explains.
    """

    def results(step: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        return [step(), *(parameter.grad for parameter in model.parameters())]

    largest = max(float((a - b).norm() / b.norm()) for a, b in zip(results(one), results(other), strict=True))
    if not largest <= TOLERANCE:
        raise RuntimeError(f"windowed and parallel training differ by {largest:.1e}: their ratio would say nothing")
    return largest


def windowed(report: Report, window: int, quick: bool, turns: int) -> None:
    """Training window by window, N = 1, beside the same hybrid over the whole sequence at once."""
    rows, tokens = (1, 1024) if quick else (2, 2048)
    ids = torch.randint(0, VOCABULARY, (rows, tokens))
    model = hybrid(window, 2 if quick else 8)
    by_window = stepping(model, lambda: model(ids, labels=ids, sleep_passes=1).loss)
    masked = stepping(model, lambda: parallel_loss(model, ids, tokens))
    as_rows = stepping(model, lambda: parallel_loss(model, ids, window))
    largest = max(difference(model, by_window, parallel) for parallel in (masked, as_rows))
    ours, one, other = in_turn([by_window, masked, as_rows], turns)
    report.add(
        f"training throughput, L = {window}, N = 1 ÷ the same hybrid in parallel",
        min(one, other) / ours,
        ">=",
        0.95,
        f"{ours:.2f} s; {one:.2f} s with a mask, {other:.2f} s with windows as rows; {rows} × {tokens} tokens, "
        f"gradients within {largest:.0e}",
    )


def checkpointing(report: Report, quick: bool, turns: int) -> None:
    """Recomputing every pass over a window in the backward."""
    model, ids, what = asleep(quick)

    def step(recompute: bool) -> Callable[[], torch.Tensor]:
        def loss() -> torch.Tensor:
            model.gradient_checkpointing = recompute
            return model(ids, labels=ids, sleep_passes=2).loss

        return stepping(model, loss)

    steps = [step(True), step(False)]
    in_turn(steps, 1)
    recomputed, kept = in_turn(steps, turns)
    report.add(
        "training step, N = 2, activation_checkpointing ÷ without",
        recomputed / kept,
        "<=",
        1.35,
        f"{recomputed:.2f} s, {kept:.2f} s; {what}",
    )


def problems(report: Report, quick: bool, turns: int) -> None:
    """GSM-Infinite's generator, in the CPU time of one thread."""
    task, count = GSMInfinite(tokens=(0, 0)), 200 if quick else 2000
    rates = []
    for turn in range(turns):
        start = time.thread_time()
        for seed in range(count):
            task.problem(turn * count + seed)
        rates.append(count / (time.thread_time() - start))
    report.add(
        "GSM-Infinite problems per CPU second, no distractors",
        statistics.median(rates),
        ">=",
        2000,
        f"median of {turns} × {count}, {min(rates):.0f} to {max(rates):.0f}; 1 to 8 operations",
    )


def training(report: Report, quick: bool) -> None:
    turns = 1 if quick else 7
    passes(report, quick, turns)
    for window in (256, 512):
        windowed(report, window, quick, turns)
    checkpointing(report, quick, turns)
    problems(report, quick, turns)


@dataclass(frozen=True)
class Shape:
    """What one training step reads.

    Args:
        windows: per row, all whole.
        passes: N.
        window_size: L.
        rows: of the batch.
    """

    windows: int = 8
    passes: int = 1
    window_size: int = 128
    rows: int = 1


AXES = {
    "windows": [Shape(windows=n) for n in (2, 4, 8, 16, 32, 64)],
    "passes": [Shape(passes=n) for n in (1, 2, 3, 4)],
    "window_size": [Shape(windows=2048 // n, window_size=n) for n in (64, 128, 256, 512)],
    "rows": [Shape(rows=n) for n in (1, 2, 4, 8)],
}
"""One thing at a time, from a common middle; where L grows, T stays."""


def scaled(shape: Shape, turns: int) -> dict:
    """Seconds and peak bytes of a step: by windows, by windows with checkpointing, and the hybrid in parallel (N = 1).

    Peaks are of tensors, without the parameters and their gradients, which stay from step to step.
    """
    model = hybrid(shape.window_size, layers=4)
    ids = torch.randint(0, VOCABULARY, (shape.rows, shape.windows * shape.window_size))

    def by_windows(recompute: bool) -> Callable[[], torch.Tensor]:
        def loss() -> torch.Tensor:
            model.gradient_checkpointing = recompute
            return model(ids, labels=ids, sleep_passes=shape.passes).loss

        return loss

    losses = {
        "by windows": by_windows(False),
        "checkpointing": by_windows(True),
        "parallel": lambda: parallel_loss(model, ids, shape.window_size),
    }
    if shape.passes > 1:
        del losses["parallel"]  # it has one pass
    steps = [stepping(model, loss) for loss in losses.values()]
    in_turn(steps, 1)
    times = in_turn(steps, turns)
    peaks = []
    for loss in losses.values():
        with TensorBytes() as counted:
            loss().backward()
        peaks.append(counted.peak)
    figures = zip(losses, times, peaks, strict=True)
    return asdict(shape) | {name: {"seconds": took, "peak_bytes": peak} for name, took, peak in figures}


def scaling(axes: list[str], turns: int) -> dict[str, list[dict]]:
    """Print a table per axis; its rows."""
    found = {}
    for axis in axes:
        print(f"\n| {axis} | ms | ÷ parallel | checkpointing ÷ without | peak MB | with checkpointing | parallel |")
        print("|---|---|---|---|---|---|---|", flush=True)
        found[axis] = []
        for shape in AXES[axis]:
            row = scaled(shape, turns)
            found[axis].append(row)
            ours, again, other = (row.get(name) for name in ("by windows", "checkpointing", "parallel"))
            beside = f"{ours['seconds'] / other['seconds']:.2f}" if other else ""
            peaks = [f"{kind['peak_bytes'] / 1e6:.0f}" if kind else "" for kind in (ours, again, other)]
            cells = [1e3 * ours["seconds"], beside, again["seconds"] / ours["seconds"], *peaks]
            shown = [cell if isinstance(cell, str) else f"{cell:.3g}" for cell in cells]
            print("|", " | ".join([str(getattr(shape, axis)), *shown]), "|", flush=True)
    return found


def profiled(window: int) -> None:
    """Print the shares of a step's time by kind of operation, by windows and in parallel, N = 1."""
    ids, model = torch.randint(0, VOCABULARY, (2, 2048)), hybrid(window, 8)
    by_window = stepping(model, lambda: model(ids, labels=ids, sleep_passes=1).loss)
    parallel = stepping(model, lambda: parallel_loss(model, ids, window))
    for name, step in (("by windows", by_window), ("parallel", parallel)):
        step()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            step()
        took = sum(event.self_cpu_time_total for event in found.key_averages())
        parts = ", ".join(f"{kind} {share:.1%}" for kind, share in shares(found).items())
        print(f"{name}, {took / 1e6:.2f} s: {parts}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES), help="by default all of them")
    parser.add_argument("--profile", action="store_true", help="shares of a step's time, L = 256, instead")
    parser.add_argument("--ratios", action="store_true", help="what `make bench` measures of training, instead")
    parser.add_argument("--json", type=Path, help="write the table's figures to this file, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.profile:
        profiled(256)
        return
    if options.ratios:
        report = Report()
        training(report, quick=False)
        console.print(report.table())
        return
    figures = scaling(options.axes, options.turns)
    if options.json:
        about = {
            "isa": torch.backends.cpu.get_cpu_capability(),
            "threads": options.threads,
            "turns": options.turns,
            "torch": torch.__version__,
        }
        options.json.write_text(json.dumps(about | {"axes": figures}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
