"""A GPU computes what the CPU computes, which the laws hold: in float64 to rounding, in bfloat16 with fla's kernels."""

import importlib.util
from unittest import mock

import pytest
import torch
from families import FAMILIES, exact, tokens
from helpers import EVICTIONS, L, T, assert_close, labelled_batch, loss_and_gradients, pad, sleeper, stream

from hf_sleep import SleepCache, SleepState, StaticSleepCache, ops
from hf_sleep.compat import CACHE

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",  # of what fla imports
    "ignore:hf_sleep trains the gated delta rule on this GPU with its slow torch fallback",
)
CASES = [
    f"{f}/{e}/N{1 + (i + j) % 4}/{('all', '1-3', '0-2')[(i + j) % 3]}{('', '/gate', '/once')[(i // 4 + j) % 3]}"
    for i, f in enumerate(FAMILIES)
    for j, e in enumerate(EVICTIONS)
]
# Stock hybrids take fla's gated norm where it is installed, which runs on a GPU alone and in float32.
STOCK = {"qwen3_next", "qwen3_5", "olmo_hybrid", "olmo_hybrid_nope", "kimi_linear"}
HAS_FLA = all(importlib.util.find_spec(name) for name in ("fla", "triton"))
EXACT = [case for case in CASES if not (HAS_FLA and case.split("/")[0] in STOCK)]


def both(case: str):
    """The case's model on the CPU, and a copy of it on the GPU."""
    return sleeper(case), sleeper(case).cuda()


@pytest.mark.parametrize("case", EXACT)
def test_reading_in_pieces_and_what_is_remembered(case):
    here, there = both(case)
    rows = [tokens(T), tokens(L + 3, 2), tokens(2 * L, 3)]
    ids, mask = pad(rows, "right")
    with torch.no_grad(), exact():
        expected, kept = stream(here, ids, (4, L, T - L - 4), attention_mask=mask)
        found, cache = stream(there, ids.cuda(), (1, T - 1), attention_mask=mask.cuda())
    assert_close(found.cpu()[mask.bool()], expected[mask.bool()], what="logits")
    for slot in kept.fast_slots:
        for mine, theirs in zip(cache.memory.carried[slot], kept.memory.carried[slot], strict=True):
            assert mine.is_cuda
            assert_close(mine.cpu(), theirs, what=f"fast weights {slot}")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of what inductor imports
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_a_cuda_graph_decodes_as_eager_does(eviction):
    """Law 12, as generate compiles it on a GPU, over sleeps."""
    model = sleeper(f"llama/{eviction}/N2/1-3", torch.float32).cuda().eval()
    torch.compiler.reset()
    call, static, plain = model.get_compiled_call(), StaticSleepCache(), SleepCache()
    with torch.no_grad():
        for token in torch.stack((tokens(T), tokens(T, 2))).cuda().split(1, 1):
            expected = model(token, cache=plain).logits
            assert_close(call(input_ids=token, **{CACHE: static}).logits, expected, 1e-4)
    assert static.is_in_place
    torch.compiler.reset()


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients(case, checkpointing):
    here, there = both(case)
    _, _, batch = labelled_batch(case)
    there.gradient_checkpointing = checkpointing
    with exact():
        loss, gradients = loss_and_gradients(here.train(), here(**batch).loss)
        there.train()
        found, theirs = loss_and_gradients(there, there(**{name: t.cuda() for name, t in batch.items()}).loss)
    assert_close(found.cpu(), loss, what="loss")
    for name, gradient in gradients.items():
        assert_close(theirs[name].cpu(), gradient, 1e-8, what=f"gradient of {name}")


@pytest.mark.parametrize("case", EXACT[::3])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_of_a_ragged_batch(case, beams):
    here, there = both(case)
    ids, mask = pad([tokens(T), tokens(4, 2), tokens(L, 3)], "left")
    settings = {"max_new_tokens": 2 * L, "do_sample": False, "num_beams": beams}
    with exact():
        expected = here.generate(ids, attention_mask=mask, **settings)
        assert torch.equal(there.generate(ids.cuda(), attention_mask=mask.cuda(), **settings).cpu(), expected)


@pytest.mark.parametrize("case", EXACT[::5])
def test_a_memory_goes_from_one_device_to_the_other(case, tmp_path):
    here, there = both(case)
    ids = tokens(T)[None]
    with torch.no_grad(), exact():
        cache = SleepCache()
        there(ids.cuda(), cache=cache)
        there.sleep(cache)
        SleepState.from_cache(there, cache).save(tmp_path / "memory.sleep")
        resumed = SleepState.load(tmp_path / "memory.sleep").to_cache(here)
        more = tokens(3, 5)[None]
        assert_close(there(more.cuda(), cache=cache).logits.cpu(), here(more, cache=resumed).logits)


# In bfloat16, with fla's kernels where they are.

# A router's choice turns on the last bit, and the others' rounding is amplified by random weights.
SMOOTH = ("llama", "qwen3", "olmo2", "gemma3", "granite", "glm4")


@pytest.mark.skipif(not HAS_FLA, reason="needs flash-linear-attention")
@pytest.mark.parametrize("family", SMOOTH)
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_bfloat16_is_as_near_as_torchs_kernels_are(family, eviction):
    case, ids = f"{family}/{eviction}/N2/all", tokens(T)[None]
    there = sleeper(case, torch.bfloat16).cuda()
    with torch.no_grad():
        with exact():
            right = sleeper(case)(ids).logits
        found = there(ids.cuda()).logits.cpu().double()
        by_steps = stream(there, ids.cuda(), [1] * T)[0].cpu().double()
        with torch_kernels():
            by_torch = there(ids.cuda()).logits.cpu().double()
    allowed = min(0.3, 0.02 + 2 * ((by_torch - right).norm() / right.norm()).item())
    assert (found - right).norm() / right.norm() < allowed
    assert (by_steps - right).norm() / right.norm() < allowed


@pytest.mark.parametrize("eviction", EVICTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_sleep_at_different_times_under_autocast(family, eviction):
    model = sleeper(f"{family}/{eviction}/N2/all", torch.float32).cuda()
    rows = [tokens(3), tokens(L + 3, 2), tokens(3 * L, 3)]
    ids, mask = pad(rows, "right")
    with torch.autocast("cuda", torch.bfloat16):
        with torch.no_grad():
            together = model(ids.cuda(), attention_mask=mask.cuda()).logits
            if family in SMOOTH:
                for row, logits in zip(rows, together, strict=True):
                    alone = model(row[None].cuda()).logits[0].double()
                    assert (logits[: len(row)].double() - alone).norm() < 0.1 * alone.norm()
        loss = model.train()(ids.cuda(), attention_mask=mask.cuda(), labels=ids.cuda()).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.fast_weights.parameters())


def torch_kernels():
    """Let torch compute the gated delta rule."""
    return mock.patch.object(ops.fla, "backend", return_value="torch")


def _inputs(length: int, key: int, value: int):
    generator = torch.Generator().manual_seed(length)
    shape = (4, length, 3)
    inputs = [torch.randn(*shape, width, generator=generator) for width in (key, key, value)]
    inputs += [-torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)]
    inputs.append(torch.randn(4, 3, key, value, generator=generator))
    kept = [torch.bfloat16] * 3 + [torch.float32, torch.bfloat16, torch.float32]
    return [t.to(dtype) for t, dtype in zip(inputs, kept, strict=True)]


def _run(rule, inputs, lengths, device, dtype=None, gradients=True):
    """The output and the state, and the gradients of a loss that reads both."""
    leaves = [t.to(device, dtype or t.dtype).requires_grad_(gradients) for t in inputs]
    o, state = rule(*leaves, lengths=lengths.to(device))
    real = (torch.arange(o.shape[1], device=o.device) < lengths.to(device)[:, None])[..., None, None]
    results = [torch.where(real, o, 0), state]
    if gradients:
        loss = sum(t.double().sin().sum() for t in results) / o.shape[1]
        results += torch.autograd.grad(loss, leaves)
    return [t.detach().cpu().double() for t in results]


@pytest.mark.skipif(not HAS_FLA, reason="needs flash-linear-attention")
@pytest.mark.parametrize(("key", "value"), [(64, 64), (96, 256), (128, 128), (8, 16)])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
def test_flas_kernels_are_as_near_as_torchs(length, key, value):
    """Forward, and all six gradients where fla has a backward, in bfloat16, ragged, a row of length 0 among them."""
    inputs = _inputs(length, key, value)
    lengths = torch.tensor([length, 0, (length + 1) // 2, length])
    gradients = ops.fla.has_backward(torch.device("cuda"))
    expected = _run(ops.naive_gated_delta_rule, inputs, lengths, "cpu", torch.float64, gradients)
    found = _run(ops.gated_delta_rule, inputs, lengths, "cuda", gradients=gradients)
    with torch_kernels():
        by_torch = _run(ops.gated_delta_rule, inputs, lengths, "cuda", gradients=gradients)
    names = ("o", "state", "q", "k", "v", "g", "beta", "initial state")
    for name, mine, torchs, right in zip(names, found, by_torch, expected, strict=False):
        scale = max(right.norm().item(), 1e-12)
        error, allowed = (mine - right).norm().item() / scale, (torchs - right).norm().item() / scale
        assert error <= 2e-2 + 2 * allowed, f"{name}: off by {error:.1e}, torch by {allowed:.1e}"
    assert torch.equal(found[1][1], inputs[-1][1].double())
