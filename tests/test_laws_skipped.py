"""Law 11: what the engine leaves out because nobody wants it changes no output, state or gradient, to the bit."""

import itertools
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from families import FAMILIES, tokens
from helpers import EVICTIONS, L, T, assert_close, pad, sleeper, states, stream
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sleep import SleepCache
from hf_sleep.engine import Eviction
from hf_sleep.registry import EVICTIONS as EVICTION_STYLES
from hf_sleep.sleep import Sleeper
from hf_sleep.training import freeze_all_but_fast_weights

CASES = [
    f"{f}/{e}/N{1 + (i + j) % 4}/{('0-2', '1-3', 'all')[(i + j) % 3]}{('', '/gate', '/once')[(i // 3 + j) % 3]}"
    for (i, f), (j, e) in itertools.product(enumerate(FAMILIES), enumerate(EVICTIONS))
]
SKIPS = [case for case in CASES if "hard" in case]


@contextmanager
def nothing_skipped():
    """Every slot runs in every pass that the algorithm names."""
    with (
        mock.patch.object(Eviction, "drops_window", return_value=False),
        mock.patch.object(Sleeper, "_wanted_now", lambda self, *_: self.order.all),
        mock.patch("hf_sleep.engine.slots._passing_no_gradient", return_value=0),
    ):
        yield


def read_and_sleep(model, passes=None):
    """Three rows of different lengths, in two calls, with few logits: outputs and states."""
    ids = torch.stack([tokens(T, n) for n in (1, 2, 3)])
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, : L + 1] = 0, 0
    cache = SleepCache()
    settings = {"cache": cache, "sleep_passes": passes, "logits_to_keep": 2}
    first = model(ids, attention_mask=mask, **settings).logits
    second = model(ids, **settings).logits
    model.sleep(cache, sleep_passes=passes)
    found = [states(model, cache, row) for row in range(3)]
    kv = [t for pair in cache.memory.carried if pair is not None for t in pair]
    return [first, second, *kv, *(t for row in found for pair in row.values() for t in pair)], cache


@pytest.mark.parametrize("case", CASES)
def test_11_outputs_and_states(case):
    model = sleeper(case, torch.float32)
    with torch.no_grad():
        lean, cache = read_and_sleep(model)
        with nothing_skipped():
            full, whole = read_and_sleep(model)
    assert len(lean) == len(full)
    assert all(torch.equal(a, b) for a, b in zip(lean, full, strict=True))
    assert cache.memory.counters == whole.memory.counters


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", SKIPS[::2])
def test_11_losses_and_gradients(case, checkpointing, frozen):
    model = sleeper(case, torch.float32).train()
    if frozen:
        freeze_all_but_fast_weights(model)
    ids = torch.stack((tokens(3 * L + 2, 1), tokens(3 * L + 2, 2)))
    labels = torch.where(torch.arange(3 * L + 2) > 2 * L, ids, -100)

    def run():
        model.zero_grad()
        loss = model(ids, labels=labels).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    if checkpointing:
        model._set_gradient_checkpointing(True)
    lean = run()
    with nothing_skipped():
        full = run()
    assert len(lean) == len(full)
    assert all(torch.equal(a, b) for a, b in zip(lean, full, strict=True))


class LastTwo(Eviction):
    """Keeps the last two tokens, and says so in `after` alone."""

    most_retained, max_position = 2, 100

    def after(self, row):
        return row.after_sleep(min(2, row.kv_length), row.position)


@pytest.mark.parametrize("passes", [1, 3])
def test_11_an_eviction_of_ones_own_that_does_not_know_of_it(passes, monkeypatch):
    monkeypatch.setitem(EVICTION_STYLES._classes, "last_two", LastTwo)
    model, ids = sleeper("llama/hard/N3/1-3", eviction="last_two"), tokens(T)[None]
    with torch.no_grad():
        stepwise, _ = stream(model, ids, [1] * T, sleep_passes=passes)
        assert_close(model(ids, logits_to_keep=1, sleep_passes=passes).logits, stepwise[:, -1:])


def layers_run(model, **settings):
    """How often each decoder layer runs in the forward and the backward of a step over three windows."""
    ids, runs = tokens(2 * L + 3)[None], [0] * len(model.lm.model.layers)

    def count(index):
        return lambda *_: runs.__setitem__(index, runs[index] + 1)

    handles = [layer.register_forward_pre_hook(count(i)) for i, layer in enumerate(model.lm.model.layers)]
    labels = torch.where(torch.arange(2 * L + 3) > 2 * L, ids, -100)
    model(ids, labels=labels, **settings).loss.backward()
    for handle in handles:
        handle.remove()
    return runs


def test_11_what_is_left_out():
    """Of a slept window the layers after the last fast weights; frozen layers before the first are not recomputed."""
    # Blocks after layers 0 and 2, a loop of layers 1 and 2: two slept windows and one that is answered in.
    model = sleeper("llama/hard/N3/1-3/gate", torch.float32).train()
    assert layers_run(model) == [3, 3 + 4, 3 + 4, 1]
    assert layers_run(model, sleep_passes=1) == [3, 3, 3, 1]
    freeze_all_but_fast_weights(model)
    model._set_gradient_checkpointing(True)
    assert layers_run(model) == [3, 2 * (3 + 4), 2 * (3 + 4), 2]
    with model.sleeping(eviction="sliding"):
        assert layers_run(model) == [3, 2 * (3 + 4), 2 * (3 + 4), 2 * 3]
    with model.sleeping(num_sink_tokens=2):
        # The first window holds the sinks, whose KV is read in every layer.
        assert layers_run(model) == [3, 2 * (3 + 4), 2 * (3 + 4), 2 * 2]


def test_11_nothing_before_the_first_block_has_a_backward():
    model = sleeper("llama/hard/N3/1-3/gate", torch.float32).train()
    freeze_all_but_fast_weights(model)
    seen = []
    handle = model.fast_weights["0"].register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    layers_run(model)
    handle.remove()
    assert seen == [False] * 3


class SliceGradients(TorchDispatchMode):
    """Notes how many tokens the gradients have that a backward makes of slices of `[B, T, C]` along T."""

    def __init__(self, like):
        super().__init__()
        self.like, self.tokens = like, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.slice_backward.default and out.dim() == 3 and out.shape[2] == self.like.shape[2]:
            self.tokens.append(out.shape[1])
        return out


@pytest.mark.parametrize("lengths", [(T, T), (T, 2 * L - 1)])
@pytest.mark.parametrize("case", ["llama/hard/N1/all", "llama/sliding+sink/N2/1-3"])
def test_11_no_window_has_a_gradient_as_long_as_the_call(case, lengths):
    model = sleeper(case, torch.float32).train()
    ids, mask = pad([tokens(n, i) for i, n in enumerate(lengths)], "right")
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()

    def run(mode):
        with mode:
            loss = model(inputs_embeds=embeds, attention_mask=mask, labels=ids).loss
            return [loss.detach(), *torch.autograd.grad(loss, [embeds, *model.fast_weights.parameters()])]

    cut, whole = SliceGradients(embeds), SliceGradients(embeds)
    lean = run(cut)
    with mock.patch("hf_sleep.sleep.in_pieces", lambda x, *_: {0: x}):
        full = run(whole)
    assert all(torch.equal(a, b) for a, b in zip(lean, full, strict=True))
    assert max(whole.tokens) == T
    assert max(cut.tokens, default=0) < T
