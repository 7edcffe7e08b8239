"""Cost of decoding one token: eager and compiled, ours and the bare base's, in one run.

    python benchmarks/decoding.py [--model FOLDER] [--window-size L] [--threads N] [--dtype float32] [--output FILE]
    python benchmarks/decoding.py --stream 10000       # a small random model over many sleeps: is it one graph?

Four ways take turns, token by token, in one process, so that a drift of the machine's speed hits all of them: the bare
base with its growing cache; the bare base compiled, with transformers' static cache of as many columns as ours has at
most; the sleeping model; and the sleeping model compiled, with a `StaticSleepCache`. All begin with the same physical
context, half a window, and end before the window is full. On a GPU the compiled ones run as CUDA graphs.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from hf_sleep import SleepCache, SleepConfig, SleepForCausalLM, StaticSleepCache, default_dtype
from hf_sleep.compat import CACHE

Way = Callable[[torch.Tensor], torch.Tensor]


def base_eager(base, context: torch.Tensor) -> Way:
    cache = DynamicCache(config=base.config)
    base(context, use_cache=True, logits_to_keep=1, **{CACHE: cache})
    return lambda ids: base(ids, use_cache=True, **{CACHE: cache}).logits


def base_compiled(base, context: torch.Tensor, columns: int, config: CompileConfig) -> Way:
    cache = StaticCache(config=base.config, max_cache_len=columns)
    base(context, use_cache=True, logits_to_keep=1, **{CACHE: cache})
    call = base.get_compiled_call(config)

    def way(ids: torch.Tensor) -> torch.Tensor:
        position = torch.tensor([[cache.get_seq_length()]], device=ids.device)
        return call(input_ids=ids, position_ids=position, use_cache=True, **{CACHE: cache}).logits

    return way


def asleep(model: SleepForCausalLM, context: torch.Tensor, config: CompileConfig | None) -> Way:
    """Decode where windows of the model's size were slept on before; `context` is what the last one holds."""
    cache = SleepCache() if config is None else StaticSleepCache()
    call = model if config is None else model.get_compiled_call(config)
    model(torch.cat((context, context), dim=1), cache=cache, logits_to_keep=1)
    model.sleep(cache)
    model(context, cache=cache, logits_to_keep=1)
    return lambda ids: call(input_ids=ids, **{CACHE: cache}).logits


def seconds(way: Way, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    way(ids)[:, -1].argmax(-1).tolist()  # as generate: the next token is looked at
    return time.perf_counter() - start


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict:
    dtype = getattr(torch, options.dtype) if options.dtype else default_dtype(options.device)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(options.device).eval()
    sleep = SleepConfig(window_size=options.window_size, block_num_heads=3, block_head_dim=64, num_blocks=6)
    model = SleepForCausalLM.from_base(base, sleep).eval()
    half = options.window_size // 2
    ids = torch.randint(3, base.config.vocab_size, (1, half + 64), device=options.device)
    context, config = ids[:, :half], CompileConfig()
    ways = {
        "base": base_eager(base, context),
        "sleep": asleep(model, context, None),
        "base, compiled": base_compiled(base, context, options.window_size, config),
        "sleep, compiled": asleep(model, context, config),
    }
    tokens = itertools.cycle(ids[:, half:].split(1, dim=1))
    first = {}
    for name, way in ways.items():  # the compiled ones compile
        first[name] = seconds(way, next(tokens))
        for _ in range(3):
            seconds(way, next(tokens))
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(min(options.turns, half - 8)):
        ids = next(tokens)
        for name, way in ways.items():
            took[name].append(seconds(way, ids))
    ratios = {
        name: statistics.median(mine / bare for mine, bare in zip(took[name], took["base"], strict=True))
        for name in took
    }
    return {
        "model": options.model,
        "dtype": str(dtype),
        "device": options.device,
        "threads": torch.get_num_threads(),
        "window_size": options.window_size,
        "turns": len(took["base"]),
        "milliseconds": {name: 1e3 * statistics.median(each) for name, each in took.items()},
        "ratio_to_base": ratios,
        "first_token_seconds": first,
        "block_bytes_over_base": sum(p.nbytes for p in model.fast_weights.parameters())
        / sum(p.nbytes for p in base.parameters()),
    }


@torch.inference_mode()
def stream(options: argparse.Namespace) -> dict:
    """Decode many tokens over many sleeps, two rows of which the second began later, compiled."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=options.window_size, **sizes))
    sleep = SleepConfig(window_size=options.window_size, sleep_passes=2, num_blocks=2)
    model = SleepForCausalLM.from_base(base.to(options.device).eval(), sleep).eval()
    call, cache = model.get_compiled_call(CompileConfig(fullgraph=True)), StaticSleepCache()
    ids = torch.randint(3, 512, (2, 8), device=options.device)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    model(ids, attention_mask=mask, cache=cache)
    took: list[float] = []
    before = counters["stats"]["unique_graphs"]
    for token in torch.randint(3, 512, (options.stream, 2, 1), device=options.device):
        took.append(seconds(lambda ids: call(input_ids=ids, **{CACHE: cache}).logits, token))
    tenth = options.stream // 10
    return {
        "tokens": options.stream,
        "device": options.device,
        "window_size": options.window_size,
        "sleeps": [row.sleeps for row in cache.memory.counters],
        "graphs": counters["stats"]["unique_graphs"] - before,
        "bytes": cache.num_bytes(),
        "last_tenth_over_second": statistics.median(took[-tenth:]) / statistics.median(took[tenth : 2 * tenth]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".demo/SmolLM2-135M-Instruct", help="Hub id or folder of a base")
    parser.add_argument("--window-size", type=int, default=512, metavar="L")
    parser.add_argument("--turns", type=int, default=100, help="tokens that each way decodes")
    parser.add_argument("--threads", type=int, help="by default torch's")
    parser.add_argument("--dtype", help="float32, bfloat16; by default the machine's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--stream", type=int, metavar="TOKENS", help="a small random model over many sleeps instead")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    found = stream(options) if options.stream else measure(options)
    text = json.dumps(found, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
