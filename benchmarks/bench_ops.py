"""Speed of the chunked gated delta rule against transformers' torch fallback, on this machine's CPU.

    python benchmarks/bench_ops.py [--quick] [--threads N] [--processes N] [--json FILE]
    python benchmarks/bench_ops.py --chunk-sizes [--threads N]   # of 16, 32 and 64 tokens, and the rule's choice

Prints milliseconds (medians) and the ratio ours / transformers, below 1 where ours is faster. The two take turns in one
process, so that a busy machine slows both alike; the ratio is the median over turns of the ratio within a turn. With
`--processes N` every size is measured in N fresh processes, and each figure is the median of theirs. The kind of
machine is torch's: on a CPU with AVX-512, `ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
MKL_ENABLE_INSTRUCTIONS=AVX2` in the environment leaves it AVX2.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import transformers
from report import in_turn
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from hf_sleep import default_dtype
from hf_sleep.ops import chunk_gated_delta_rule, chunked

# Rows of a batch and (heads, key width, value width).
BATCHES = (1, 8)
HEADS = ((4, 64, 64), (9, 64, 128), (12, 96, 256))
TOKENS = (64, 128, 256, 512, 1024, 2048)
# And bfloat16 where the CPU has it.
DTYPES = tuple(dict.fromkeys((torch.float32, default_dtype("cpu"))))
MAX_VALUES = 2**24  # elements of v; what is larger needs more memory than a small machine has


def theirs(q, k, v, g, beta, state):
    return torch_chunk_gated_delta_rule(
        q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )


def forward(rule: Callable, inputs: list[torch.Tensor]) -> None:
    with torch.no_grad():
        rule(*inputs)


def forward_and_backward(rule: Callable, inputs: list[torch.Tensor]) -> None:
    o, state = rule(*inputs)
    torch.autograd.grad([o, state], inputs, [torch.ones_like(o), torch.ones_like(state)])


def make_inputs(batch: int, tokens: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype):
    torch.manual_seed(0)
    q, k = (torch.randn(batch, tokens, heads, key_dim, dtype=dtype) for _ in range(2))
    v = torch.randn(batch, tokens, heads, value_dim, dtype=dtype)
    g = -torch.rand(batch, tokens, heads)
    beta = torch.rand(batch, tokens, heads)
    state = torch.randn(batch, heads, key_dim, value_dim)
    return [x.requires_grad_() for x in (q, k, v, g, beta, state)]


PARTS = {"forward": forward, "forward + backward": forward_and_backward}


def seconds(run: Callable, rule: Callable, inputs: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    run(rule, inputs)
    return time.perf_counter() - start


def compare(run: Callable, inputs: list[torch.Tensor], budget: float, least: int) -> dict[str, float]:
    """Median milliseconds of ours and of theirs, and the median ratio, from about `budget` seconds, `least` turns."""
    seconds(run, chunk_gated_delta_rule, inputs)
    once = seconds(run, theirs, inputs)
    turns = max(least, min(200, int(budget / (2 * once))))
    times = []
    for turn in range(turns):
        order = (chunk_gated_delta_rule, theirs)[:: 1 if turn % 2 else -1]
        taken = {rule: seconds(run, rule, inputs) for rule in order}
        times.append((taken[chunk_gated_delta_rule], taken[theirs]))
    ours, reference = (1e3 * statistics.median(x) for x in zip(*times, strict=True))
    return {"ours": ours, "theirs": reference, "ratio": statistics.median(a / b for a, b in times)}


def sizes(quick: bool) -> list[dict]:
    """Every size, of the two dtypes: rows, heads, key and value width, tokens."""
    tokens, heads = (TOKENS[:3], HEADS[:2]) if quick else (TOKENS, HEADS)
    return [
        {"dtype": str(dtype)[6:], "B": batch, "H": h, "K": key_dim, "V": value_dim, "T": t}
        for dtype, batch, (h, key_dim, value_dim), t in itertools.product(DTYPES, BATCHES, heads, tokens)
        if batch * t * h * value_dim <= MAX_VALUES
    ]


def measure(size: dict, budget: float, least: int) -> dict:
    """A size and its figures: what `compare` gives, per part."""
    inputs = make_inputs(*(size[name] for name in "BTHKV"), getattr(torch, size["dtype"]))
    return size | {name: compare(run, inputs, budget, least) for name, run in PARTS.items()}


def show(row: dict) -> None:
    cells = " ".join("{ours:8.2f} /{theirs:8.2f} ={ratio:5.2f}".format(**row[part]) for part in PARTS)
    print(f"{row['dtype']:8} {row['B']:2} {row['H']:3} {row['K']:3} {row['V']:3} {row['T']:5} {cells}", flush=True)


def in_this_process(quick: bool) -> list[dict]:
    """Every size with its figures, printed as they come."""
    rows = []
    for size in sizes(quick):
        rows.append(measure(size, 0.3 if quick else 1.0, least=5))
        show(rows[-1])
    return rows


def header() -> None:
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads; "
        "ms ours / ms transformers = ratio"
    )
    print(f"{'dtype':8} {'B':>2} {'H':>3} {'K':>3} {'V':>3} {'T':>5} {'forward':>25} {'forward + backward':>25}")


def in_fresh_processes(options: argparse.Namespace) -> list[dict]:
    """Every size's medians over fresh processes, with the ratio of each, printed as they come."""
    wanted = [size for size in sizes(options.quick) if options.batch in (None, size["B"])]
    wanted = [size for size in wanted if options.dtype in (None, size["dtype"])]
    runs = [fresh_process(wanted) for _ in range(options.processes)]
    rows = [same[0] | {part: median([row[part] for row in same]) for part in PARTS} for same in zip(*runs, strict=True)]
    for row in rows:
        show(row)
    return rows


def fresh_process(wanted: list[dict]) -> list[dict]:
    """The figures of these sizes, by this file in a process that has run nothing."""
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--sizes", json.dumps(wanted)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def chunk_sizes() -> None:
    """Print milliseconds with chunks of each size, in turn, float32; `*` after what `chunk_size` chooses."""

    def in_chunks_of(size: int) -> Callable:
        def rule(*inputs: torch.Tensor):
            with mock.patch.object(chunked, "chunk_size", return_value=size):
                return chunk_gated_delta_rule(*inputs)

        return rule

    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads; ms, chunks of 16, 32, 64")
    for batch, (h, key_dim, value_dim), tokens in itertools.product(
        BATCHES, HEADS, (16, 32, 48, 64, 80, 128, 256, 512)
    ):
        inputs, cells = make_inputs(batch, tokens, h, key_dim, value_dim, torch.float32), []
        for run in PARTS.values():
            rules = [in_chunks_of(size) for size in (16, 32, 64)]
            steps = [lambda run=run, rule=rule, inputs=inputs: run(rule, inputs) for rule in rules]
            in_turn(steps, 1)
            for size, took in zip((16, 32, 64), in_turn(steps, 9), strict=True):
                cells.append(f"{1e3 * took:8.2f}{'*' if size == chunked.chunk_size(tokens) else ' '}")
        print(f"{batch:2} {h:3} {key_dim:3} {value_dim:3} {tokens:5}", *cells, flush=True)


def median(figures: list[dict[str, float]]) -> dict:
    medians = {name: statistics.median(one[name] for one in figures) for name in figures[0]}
    return medians | {"ratios": [one["ratio"] for one in figures]}


def machine() -> dict:
    return {
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and turns: about half a minute")
    parser.add_argument("--threads", type=int, help="on a busy machine, 1 gives steadier ratios")
    parser.add_argument("--processes", type=int, default=1, help="fresh processes per size (default: this one)")
    parser.add_argument("--batch", type=int, choices=BATCHES, help="with --processes: these sizes alone")
    parser.add_argument("--dtype", choices=[str(dtype)[6:] for dtype in DTYPES], help="with --processes: alone")
    parser.add_argument("--chunk-sizes", action="store_true", help="compare chunks of 16, 32 and 64 tokens instead")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--sizes", type=json.loads, help=argparse.SUPPRESS)  # of a fresh process
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.sizes:
        print(json.dumps([measure(size, 0.3, least=1) for size in options.sizes]))
        return
    if options.chunk_sizes:
        chunk_sizes()
        return
    header()
    rows = in_fresh_processes(options) if options.processes > 1 else in_this_process(options.quick)
    for part in PARTS:
        of_part = [row[part]["ratio"] for row in rows]
        print(f"{part}: worst {max(of_part):.2f}, median {statistics.median(of_part):.2f}, best {min(of_part):.2f}")
    if options.json:
        figures = machine() | {"processes": options.processes, "rows": rows}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
