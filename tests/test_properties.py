"""Stream = batch = reference: whatever the lengths, splits, paddings, N per call, explicit sleeps, rests as a state."""

import pytest
import torch
from families import exact, make_model, sleep_config, tokens
from helpers import assert_close, assert_same_states, states
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import reference_run

from hf_sleep import SleepCache, SleepState

COMMON = settings(
    max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
CONFIGS = st.fixed_dictionaries(
    {
        "window_size": st.integers(2, 6),
        "eviction": st.sampled_from(["hard", "sliding"]),
        "num_sink_tokens": st.integers(0, 1),
        "loop_layers": st.sampled_from([None, (0, 2), (1, 3), (2, 4), (1, 2)]),
        "block_kind": st.sampled_from(["jet", "gated_delta_net"]),
    }
)
FAMILY = st.sampled_from(["llama_yarn", "mistral_window", "gemma3", "qwen3_next", "qwen3_5"])


@st.composite
def calls(draw):
    """Draw per call every row's (pads before, tokens, pads after), N, and the N of an explicit sleep after it or 0."""
    batch = draw(st.integers(1, 3))
    plan = []
    for _ in range(draw(st.integers(1, 5))):
        lengths = [draw(st.integers(0, 7)) for _ in range(batch)]
        width = max(*lengths, 1) + draw(st.integers(0, 2))
        before = [draw(st.integers(0, width - n)) for n in lengths]
        rows = [(b, n, width - b - n) for b, n in zip(before, lengths, strict=True)]
        plan.append((rows, draw(st.integers(1, 3)), draw(st.sampled_from([0, 0, 0, 1, 2]))))
    return plan


@given(family=FAMILY, config=CONFIGS, plan=calls(), whole_mask=st.booleans())
@COMMON
def test_every_stream_is_the_reference(family, config, plan, whole_mask):
    model = make_model(family, sleep_config(family, **config), torch.double)
    batch = len(plan[0][0])
    rows = [tokens(sum(call[0][r][1] for call in plan), r) for r in range(batch)]
    read, passes, explicit = [0] * batch, [[] for _ in rows], [{} for _ in rows]
    logits, cache, past = [[] for _ in rows], SleepCache(), torch.zeros(batch, 0, dtype=torch.long)
    with exact(), torch.no_grad():
        for layout, n, then_sleep in plan:
            width = sum(layout[0])
            ids, mask = torch.full((batch, width), 3), torch.zeros(batch, width, dtype=torch.long)
            for r, (before, length, _) in enumerate(layout):
                ids[r, before : before + length] = rows[r][read[r] : read[r] + length]
                mask[r, before : before + length] = 1
                read[r] += length
                passes[r] += [n] * length
            past = torch.cat((past, mask), 1)
            out = model(ids, attention_mask=past if whole_mask else mask, cache=cache, sleep_passes=n)
            for r in range(batch):
                logits[r].append(out.logits[r][mask[r].bool()])
            assert not out.logits[mask == 0].any()
            if then_sleep:
                model.sleep(cache, sleep_passes=then_sleep)
                for r in range(batch):
                    explicit[r].setdefault(read[r] - 1, then_sleep)
            # Put away after every call: what it holds is what a state of this model may hold.
            cache = SleepState.from_cache(model, cache).to_cache(model)
        assert cache.get_seq_length() == past.shape[1]
        for r, ids in enumerate(rows):
            if len(ids):
                run = reference_run(model, ids, passes[r], explicit[r])
                assert_close(torch.cat(logits[r]), run.logits, what=f"row {r}")
                assert_same_states(states(model, cache, r), run.memory)


@given(family=FAMILY, config=CONFIGS, lengths=st.lists(st.integers(1, 15), min_size=1, max_size=3), data=st.data())
@COMMON
def test_every_batch_is_its_rows(family, config, lengths, data):
    passes = data.draw(st.integers(1, 3))
    model = make_model(family, sleep_config(family, **config, sleep_passes=passes), torch.double)
    width = max(lengths) + data.draw(st.integers(0, 2))
    ids, mask = torch.full((len(lengths), width), 5), torch.zeros(len(lengths), width, dtype=torch.long)
    for r, length in enumerate(lengths):
        before = data.draw(st.integers(0, width - length))
        ids[r, before : before + length], mask[r, before : before + length] = tokens(length, r), 1
    with exact(), torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        for r, length in enumerate(lengths):
            assert_close(logits[r][mask[r].bool()], reference_run(model, tokens(length, r)).logits, what=f"row {r}")


MODEL = {}


@given(mask=st.lists(st.lists(st.integers(0, 1), min_size=9, max_size=9), min_size=2, max_size=2))
@settings(COMMON, max_examples=60)
def test_masks_with_holes_are_refused_and_change_nothing(mask):
    model = MODEL.setdefault("llama", make_model("llama", sleep_config("llama", window_size=4), torch.double))
    holes = any("01" in "".join(map(str, row)).strip("0") for row in mask)
    ids, mask = torch.stack((tokens(9, 1), tokens(9, 2))), torch.tensor(mask)
    with exact(), torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).cache
        before, rows, length = cache.memory, cache.memory.counters, cache.get_seq_length()
        if holes:
            with pytest.raises(ValueError, match="attention_mask"):
                model(ids, attention_mask=mask, cache=cache)
            assert cache.memory is before
            assert cache.memory.counters == rows
            assert cache.get_seq_length() == length
        else:
            model(ids, attention_mask=mask, cache=cache)
            assert cache.get_seq_length() == length + 9
        with pytest.raises(ValueError, match="attention_mask"):
            model(ids, attention_mask=torch.ones(2, 8, dtype=torch.long))
