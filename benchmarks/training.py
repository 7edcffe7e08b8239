"""Costs of training through sleep, beside what they could be: steps are a forward and a backward, no optimizer."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from report import Report, in_turn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sleep import SleepConfig, SleepForCausalLM
from hf_sleep.data import GSMInfinite

VOCABULARY = 256
TOLERANCE = 1e-4  # float32


def hybrid(window: int, quick: bool) -> SleepForCausalLM:
    """Eight layers of 256 channels and two Jet blocks that write something, in training."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=2 if quick else 8,
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
    return hybrid(window, quick), ids, f"{rows} × {windows} windows of {window}"


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
    model = hybrid(window, quick)
    by_window = stepping(model, lambda: model(ids, labels=ids, sleep_passes=1).loss)
    masked = stepping(model, lambda: parallel_loss(model, ids, tokens))
    as_rows = stepping(model, lambda: parallel_loss(model, ids, window))
    largest = max(difference(model, by_window, parallel) for parallel in (masked, as_rows))
    ours, one, other = in_turn([by_window, masked, as_rows], turns)
    report.add(
        f"training throughput, L = {window}, N = 1 ÷ the same hybrid in parallel",
        min(one, other) / ours,
        ">=",
        0.9,
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
        1.4,
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
