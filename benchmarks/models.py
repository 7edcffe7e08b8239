"""Jet-Nemotron and Ouro, asleep and awake, beside the plain models: python benchmarks/models.py --out FOLDER

On a CUDA GPU: the real sizes (Jet-Nemotron 2B, Ouro 1.4B) with random weights in bfloat16 (float32 where it lacks
that), T = 12,000 tokens. Without one: tiny configs and T = 384, which shows that the script works and nothing about
speed. Every figure is of this one run; what the time budget left no room for is listed as not run. Writes models.json
and models.md.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_sleep import SleepCache, SleepConfig, SleepForCausalLM, default_dtype, ops
from hf_sleep.bases import JetNemotronConfig, OuroConfig

GOLDENS = Path(__file__).resolve().parents[1] / "tests" / "goldens"
ANSWER = 256
"""Tokens at the end of the sequence that carry the training loss, as a question after a long context does."""


@dataclass
class Scale:
    """Sizes of what is run.

    Args:
        dtype: of weights and activations.
        tokens: T, of a sequence.
        windows: L, in tokens.
        passes: N.
        new_tokens: decoded per measurement.
        turns: measurements per figure, of which the median counts.
    """

    dtype: torch.dtype
    tokens: int
    windows: tuple[int, ...]
    passes: tuple[int, ...]
    new_tokens: int
    turns: int


REAL = Scale(default_dtype(), 12_000, (1024, 2048, 4096), (1, 2, 4), 64, 3)
TINY = Scale(torch.float32, 384, (64, 128), (1, 2), 4, 2)


def configs(real: bool) -> dict[str, PreTrainedConfig]:
    """The two models of the paper; their published sizes, which are the defaults, or tiny ones."""
    if real:
        return {"Jet-Nemotron 2B": JetNemotronConfig(), "Ouro 1.4B": OuroConfig()}
    return {
        "Jet-Nemotron tiny": JetNemotronConfig.from_pretrained(GOLDENS / "jet_nemotron"),
        "Ouro tiny": OuroConfig.from_pretrained(GOLDENS / "ouro"),
    }


class Run:
    """The device, the clock and the figures of one run."""

    def __init__(self, budget: float):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.ends = time.monotonic() + budget
        self.rows: list[dict] = []

    def has_time(self, what: str) -> bool:
        if time.monotonic() < self.ends:
            return True
        self.add(what, "not run: out of time", "")
        return False

    def add(self, what: str, value: float | str, unit: str, against: str = "") -> None:
        self.rows.append({"what": what, "value": value, "unit": unit, "against": against})
        print(f"{what}: {value if isinstance(value, str) else f'{value:.4g}'} {unit} {against}".rstrip(), flush=True)

    def seconds(self, function: Callable[[], object], turns: int) -> tuple[float, float]:
        """Median seconds after one warm-up, and peak GPU memory in GiB (NaN on a CPU)."""
        function()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(turns):
            start = time.perf_counter()
            function()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else float("nan")
        return statistics.median(times), peak


@contextmanager
def torch_kernels() -> Iterator[None]:
    """Let torch compute `gated_delta_rule`, fla or not."""
    stock = ops.fla.backend
    ops.fla.backend = lambda device: "torch"  # type: ignore[assignment]
    try:
        yield
    finally:
        ops.fla.backend = stock


def gib(peak: float) -> str:
    return "" if peak != peak else f", peak {peak:.1f} GiB"


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def parity_of_kernels(run: Run) -> None:
    """The op in bf16 as dispatched (fla on a GPU that has it) and by torch, against float64 of the same input."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 333, 4)
    inputs = [torch.randn(*shape, width, generator=generator) for width in (96, 96, 256)]
    inputs += [-torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)]
    inputs.append(0.1 * torch.randn(2, 4, 96, 256, generator=generator))
    dtypes = [torch.bfloat16] * 3 + [torch.float32, torch.bfloat16, torch.float32]
    inputs = [t.to(dtype) for t, dtype in zip(inputs, dtypes, strict=True)]
    lengths = torch.tensor([333, 200])

    def outputs(device: torch.device, dtype: torch.dtype | None, with_gradients: bool = True) -> list[torch.Tensor]:
        leaves = [t.to(device, dtype or t.dtype).requires_grad_(with_gradients) for t in inputs]
        results = ops.gated_delta_rule(*leaves, lengths=lengths.to(device))
        if not with_gradients:
            return list(results)
        return [*results, *torch.autograd.grad(sum(t.double().square().mean() for t in results), leaves)]

    expected = outputs(torch.device("cpu"), torch.float64)
    names = ("o", "state", *(f"gradient of {name}" for name in ("q", "k", "v", "g", "beta", "initial_state")))
    with torch_kernels():
        by_torch = outputs(run.device, None)
        by_torch_fp32 = outputs(run.device, torch.float32)
    reader = ops.backend(run.device)
    trainer = reader if reader == "torch" or ops.fla.has_backward(run.device) else "torch"
    kinds = (
        (f"{reader}, reading", outputs(run.device, None, with_gradients=False)),
        (f"{trainer}, training", outputs(run.device, None)),
    )
    for kind, results in kinds:
        for name, actual, right, torchs, fp32 in zip(names, results, expected, by_torch, by_torch_fp32, strict=False):
            against = f"torch bf16 {relative_error(torchs, right):.1e}, torch fp32 {relative_error(fp32, right):.1e}"
            run.add(f"op, {kind}, bf16: {name}", relative_error(actual, right), "relative", against)


def parity_of_goldens(run: Run) -> None:
    """Logits of the tiny checkpoints against what the original implementations computed, in fp32 and bf16."""
    for name, key in (("jet_nemotron", "short"), ("ouro", "")):
        golden = load_file(GOLDENS / name / "golden.safetensors")
        ids = golden[f"{key}.input_ids".lstrip(".")]
        expected = golden["logits_per_step"][-1] if name == "ouro" else golden[f"{key}.logits"]
        for dtype in (torch.float32, torch.bfloat16):
            model = AutoModelForCausalLM.from_pretrained(GOLDENS / name, dtype=dtype).to(run.device).eval()
            with torch.no_grad():
                logits = model(ids.to(run.device)).logits
                with torch_kernels():
                    by_torch = model(ids.to(run.device)).logits
            kernel = ops.backend(run.device) if dtype == torch.bfloat16 else "torch"
            against = f"torch kernels {relative_error(by_torch, expected):.1e}"
            run.add(f"{name} golden logits, {dtype}, {kernel}", relative_error(logits, expected), "relative", against)


def reading_and_decoding(run: Run, name: str, base: PreTrainedModel, scale: Scale) -> None:
    """Tokens per second of prefill and decode, the plain model's beside the sleeping one's."""
    ids = torch.randint(3, base.config.vocab_size, (1, scale.tokens), device=run.device)

    def speeds(model: PreTrainedModel, **kwargs: object) -> tuple[float, float, float]:
        with torch.no_grad():
            read, peak = run.seconds(lambda: model(ids, use_cache=True, logits_to_keep=1, **kwargs), scale.turns)
            cache = model(ids, use_cache=True, logits_to_keep=1, **kwargs).cache

            def decode() -> None:
                token = ids[:, :1]
                for _ in range(scale.new_tokens):
                    token = model(token, cache=cache, use_cache=True, **kwargs).logits[:, -1:].argmax(-1)

            decoded, _ = run.seconds(decode, scale.turns)
        return scale.tokens / read, scale.new_tokens / decoded, peak

    if not run.has_time(f"{name}: reading and decoding"):
        return
    plain_read, plain_decode, plain_peak = speeds(base)
    run.add(f"{name} plain: reading", plain_read, "tokens/s", gib(plain_peak).lstrip(", "))
    run.add(f"{name} plain: decoding after {scale.tokens:,} tokens", plain_decode, "tokens/s")
    for window in scale.windows:
        model = SleepForCausalLM.from_base(base, SleepConfig(window_size=window)).eval()
        for passes in scale.passes:
            setting = f"{name} asleep, L = {window}, N = {passes}"
            if not run.has_time(setting):
                continue
            read, decode, peak = speeds(model, sleep_passes=passes)
            run.add(f"{setting}: reading", read, "tokens/s", f"{read / plain_read:.2f} x plain{gib(peak)}")
            run.add(f"{setting}: decoding", decode, "tokens/s", f"{decode / plain_decode:.2f} x plain")
        if not run.has_time(f"{name} asleep, L = {window}: a sleep"):
            continue
        cache = SleepCache()
        with torch.no_grad():
            model(ids, cache=cache, logits_to_keep=1, sleep_passes=1)
            pause, _ = run.seconds(lambda m=model, c=cache: m.sleep(c.fork(), 4), scale.turns)
        held = f"{cache.memory.counters[0].fill} tokens in the window, {cache.num_bytes() / 2**20:.1f} MiB held"
        run.add(f"{name} asleep, L = {window}: a sleep with N = 4", pause * 1e3, "ms", held)


def training(run: Run, name: str, base: PreTrainedModel, scale: Scale) -> None:
    """Seconds and peak memory of a whole training step (forward, backward, AdamW) with activation checkpointing."""
    answer = min(ANSWER, scale.tokens // 4)
    ids = torch.randint(3, base.config.vocab_size, (1, scale.tokens), device=run.device)
    labels = ids.clone()
    labels[:, :-answer] = -100

    def plain_loss() -> torch.Tensor:
        hidden = base.model(ids, use_cache=False).last_hidden_state[:, -answer - 1 : -1]
        return F.cross_entropy(base.get_output_embeddings()(hidden)[0].float(), ids[0, -answer:])

    def step(model: PreTrainedModel, loss: Callable[[], torch.Tensor]) -> tuple[float, float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=run.device.type == "cuda")

        def once() -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        return run.seconds(once, scale.turns)

    if not run.has_time(f"{name}: training"):
        return
    base.train()
    base.gradient_checkpointing_enable()
    plain, plain_peak = step(base, plain_loss)
    base.gradient_checkpointing_disable()
    run.add(f"{name} plain: training step", plain, "s", f"{scale.tokens / plain:.0f} tokens/s{gib(plain_peak)}")
    for window in scale.windows:
        model = SleepForCausalLM.from_base(base, SleepConfig(window_size=window)).train()
        model.gradient_checkpointing = True
        first = None
        for passes in scale.passes:
            setting = f"{name} asleep, L = {window}, N = {passes}: training step"
            if not run.has_time(setting):
                continue
            time_, peak = step(model, lambda m=model, n=passes: m(ids, labels=labels, sleep_passes=n).loss)
            first = first or time_
            ratios = f"{time_ / plain:.2f} x plain, {time_ / first:.2f} x N = {scale.passes[0]}"
            run.add(setting, time_, "s", f"{ratios}, {scale.tokens / time_:.0f} tokens/s{gib(peak)}")
    base.eval()


def write(run: Run, out: Path, real: bool) -> None:
    device = torch.cuda.get_device_name() if run.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    sizes = "real sizes, random weights" if real else "tiny configs, which say nothing about the models' speed"
    lines = [f"{device}; {versions}; kernels: {ops.backend(run.device)}; {sizes}.", ""]
    lines += ["| what | measured | unit | against |", "|---|---|---|---|"]
    for row in run.rows:
        value = row["value"] if isinstance(row["value"], str) else f"{row['value']:.4g}"
        lines.append(f"| {row['what']} | {value} | {row['unit']} | {row['against']} |")
    out.mkdir(parents=True, exist_ok=True)
    (out / "models.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    header = {"device": device, "versions": versions, "real": real}
    (out / "models.json").write_text(json.dumps({**header, "rows": run.rows}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for models.json and models.md")
    parser.add_argument("--budget", type=float, default=480, help="seconds after which nothing new is begun")
    parser.add_argument("--only", choices=("parity", "reading", "training"), help="one part alone")
    parser.add_argument("--size", choices=("real", "tiny"), help="by default real on a GPU, tiny without one")
    options = parser.parse_args()
    run = Run(options.budget)
    real = run.device.type == "cuda" if options.size is None else options.size == "real"
    scale = REAL if real else TINY
    torch.manual_seed(0)
    if options.only in (None, "parity"):
        parity_of_kernels(run)
        parity_of_goldens(run)
    models = {} if options.only == "parity" else configs(real)
    write(run, options.out, real)
    began, left = time.monotonic(), run.ends - time.monotonic()
    for i, (name, config) in enumerate(models.items()):
        run.ends = began + left * (i + 1) / len(models)
        with run.device:
            base = AutoModelForCausalLM.from_config(config, dtype=scale.dtype).eval()
        run.add(f"{name}: parameters", sum(p.numel() for p in base.parameters()) / 1e6, "million")
        if options.only != "training":
            reading_and_decoding(run, name, base, scale)
        if options.only != "reading":
            training(run, name, base, scale)
        write(run, options.out, real)
        del base
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
