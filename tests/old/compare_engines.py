"""Compare the engine with the one it takes the place of, bit for bit, on every case of the laws.

Usage: PYTHONPATH=tests:tests/old python tests/old/compare_engines.py [part of a case's name]
"""

import sys
import warnings

import old_hf_sleep
import torch
from families import exact, make_base, randomize, sleep_config, tokens
from test_laws import EVICTIONS, FULL, LOOPED, LOOPS, SPREAD, L, T, labelled_batch, pad

import hf_sleep

torch.set_num_threads(1)


def pair_of_models(case: str, dtype: torch.dtype):
    """The same sleeping model in both packages."""
    family, eviction, passes, loop = case.split("/")
    style, sinks = EVICTIONS[eviction]
    fields = vars(
        sleep_config(
            family,
            window_size=L,
            eviction=style,
            num_sink_tokens=sinks,
            sleep_passes=int(passes[1:]),
            loop_layers=LOOPS[loop],
            block_kind="gated_delta_net" if passes in ("N2", "N4") else "jet",
        )
    )
    models = []
    for package in (old_hf_sleep, hf_sleep):
        known = package.SleepConfig.__dataclass_fields__
        sleep = package.SleepConfig(**{name: value for name, value in fields.items() if name in known})
        model = package.SleepForCausalLM.from_base(make_base(family, dtype), sleep)
        randomize(model.fast_weights, 1)
        models.append(model.to(dtype).eval())
    return models


def tensors_of(cache) -> list[torch.Tensor]:
    """Everything a cache of either package holds, in one order."""
    held = []
    (cache.memory if hasattr(cache, "memory") else cache.tensors).map(lambda t: held.append(t) or t)
    return held


def counters_of(cache) -> list[tuple]:
    rows = cache.memory.counters if hasattr(cache, "memory") else cache.rows
    return [(r.seen, r.fill, r.retained, r.position, r.sleeps, r.pads >> 32, r.pads % 2**32) for r in rows]


def everything(model, package, case: str) -> list[torch.Tensor]:
    """Logits, states and gradients of all that the laws do with a model."""
    out = []
    with torch.no_grad():
        for sizes in ([T], [1] * T, [4, 9, 3, 1], [T - L] + [1] * L):
            cache, first = package.SleepCache(), 0
            for size in sizes:
                out.append(model(tokens(T)[None, first : first + size], cache=cache).logits)
                first += size
            out += [*tensors_of(cache), torch.tensor(counters_of(cache))]
            model.sleep(cache)
            out += [model(tokens(L + 2, 9)[None], cache=cache).logits, *tensors_of(cache)]
        for side in ("left", "right"):
            cache = package.SleepCache()
            for number, lengths in enumerate([(T, L + 1, 2, L), (3, 0, L + 2, 1), (1, 1, 1, 1)]):
                ids, mask = pad([tokens(n, 10 * r + number) for r, n in enumerate(lengths)], side)
                out.append(model(ids, attention_mask=mask, cache=cache).logits)
            out += [*tensors_of(cache), torch.tensor(counters_of(cache))]
            cache.batch_select_indices(torch.tensor([2, 0, 0]))
            out += tensors_of(cache)
    for checkpointing, backprop_windows in ((False, None), (True, None), (False, 1)):
        model.train()
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        loss = model(**labelled_batch(case)[2], backprop_windows=backprop_windows).loss
        loss.backward()
        out.append(loss.detach())
        out += [p.grad.clone() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    model.eval()
    return out


def main() -> None:
    warnings.simplefilter("ignore")
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    cases = [case for case in dict.fromkeys(FULL + LOOPED + SPREAD) if wanted in case]
    compared, differ = 0, []
    for case in cases:
        for dtype in (torch.double, torch.float32) if case in SPREAD else (torch.double,):
            old, new = pair_of_models(case, dtype)
            if dtype == torch.double:
                with exact():
                    pairs = everything(old, old_hf_sleep, case), everything(new, hf_sleep, case)
            else:
                pairs = everything(old, old_hf_sleep, case), everything(new, hf_sleep, case)
            same = len(pairs[0]) == len(pairs[1]) and all(map(torch.equal, *pairs))
            compared += len(pairs[0])
            if not same:
                differ.append(f"{case} {dtype}")
                print(
                    "differs:",
                    differ[-1],
                    [i for i, (a, b) in enumerate(zip(*pairs, strict=False)) if not torch.equal(a, b)][:9],
                )
    print(f"{len(cases)} cases, {compared:,} tensors compared bit for bit, {len(differ)} cases differ")
    sys.exit(bool(differ))


main()
