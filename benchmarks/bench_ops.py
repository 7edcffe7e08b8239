"""Speed of the chunked gated delta rule against transformers' torch fallback, on this machine's CPU.

    python benchmarks/bench_ops.py [--quick] [--threads N]

Prints milliseconds (medians) and the ratio ours / transformers, below 1 where ours is faster. The two take turns in one
process, so that a busy machine slows both alike; the ratio is the median over turns of the ratio within a turn.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from hf_sleep import default_dtype
from hf_sleep.ops import chunk_gated_delta_rule

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


def seconds(run: Callable, rule: Callable, inputs: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    run(rule, inputs)
    return time.perf_counter() - start


def compare(run: Callable, inputs: list[torch.Tensor], budget: float) -> tuple[float, float, float]:
    """Median seconds of ours and of theirs, and the median ratio, from turns that last about `budget` seconds."""
    seconds(run, chunk_gated_delta_rule, inputs)
    once = seconds(run, theirs, inputs)
    turns = max(5, min(200, int(budget / (2 * once))))
    times = []
    for turn in range(turns):
        order = (chunk_gated_delta_rule, theirs)[:: 1 if turn % 2 else -1]
        taken = {rule: seconds(run, rule, inputs) for rule in order}
        times.append((taken[chunk_gated_delta_rule], taken[theirs]))
    ours, reference = (statistics.median(x) for x in zip(*times, strict=True))
    return ours, reference, statistics.median(a / b for a, b in times)


def ratios(quick: bool) -> list[tuple[int, float, float]]:
    """Print a row per size; tokens, ratio forward, ratio forward + backward."""
    tokens = TOKENS[:3] if quick else TOKENS
    heads = HEADS[:2] if quick else HEADS
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ms ours / ms transformers = ratio")
    print(f"{'dtype':8} {'B':>2} {'H':>3} {'K':>3} {'V':>3} {'T':>5} {'forward':>25} {'forward + backward':>25}")
    measured = []
    for dtype, batch, (h, key_dim, value_dim), t in itertools.product(DTYPES, BATCHES, heads, tokens):
        if batch * t * h * value_dim > MAX_VALUES:
            continue
        inputs = make_inputs(batch, t, h, key_dim, value_dim, dtype)
        row = [compare(run, inputs, 0.3 if quick else 1.0) for run in (forward, forward_and_backward)]
        measured.append((t, row[0][2], row[1][2]))
        cells = " ".join(f"{1e3 * a:8.2f} /{1e3 * b:8.2f} ={r:5.2f}" for a, b, r in row)
        print(f"{str(dtype)[6:]:8} {batch:2} {h:3} {key_dim:3} {value_dim:3} {t:5} {cells}", flush=True)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and turns: about half a minute")
    parser.add_argument("--threads", type=int, help="on a busy machine, 1 gives steadier ratios")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    both = [ratio for _, *row in ratios(args.quick) for ratio in row]
    print(f"ratio: worst {max(both):.2f}, median {statistics.median(both):.2f}, best {min(both):.2f}")


if __name__ == "__main__":
    main()
