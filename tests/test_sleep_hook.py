"""`model.on_sleep`: who slept, after how many tokens, for how long, with which N."""

import dataclasses

import pytest
import torch
from families import make_model, sleep_config, tokens
from helpers import pad

from hf_sleep import SleepCache, SleepEvent

L = 5


def sleeper(family="llama", **fields):
    return make_model(family, sleep_config(family, **({"window_size": L} | fields)))


def seen(events):
    return [(event.row, event.tokens, event.sleep_passes) for event in events]


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3_next", "ouro"])
def test_every_sleep_of_a_read_is_told_with_its_n(family, passes, eviction):
    model, events = sleeper(family, sleep_passes=passes, eviction=eviction), []
    with torch.no_grad(), model.on_sleep(events.append):
        model(tokens(3 * L)[None])
        assert seen(events) == [(0, L, passes), (0, 2 * L, passes)]
        # A setting of the call counts, too.
        model(tokens(L + 1)[None], sleep_passes=4)
    assert seen(events)[2:] == [(0, L, 4)]
    assert all(event.seconds > 0 for event in events)


def test_rows_are_told_when_they_sleep_and_pads_do_not_count():
    model, events = sleeper(), []
    rows = [tokens(n, seed=n) for n in (2 * L + 1, 3, L + 1)]
    ids, mask = pad(rows, "left")
    with torch.no_grad(), model.on_sleep(events.append):
        model(ids, attention_mask=mask)
    assert sorted(seen(events)) == [(0, L, 2), (0, 2 * L, 2), (2, L, 2)]
    together = [event for event in events if event.tokens == L]
    assert len({event.seconds for event in together}) == 1


def test_tokens_are_counted_over_calls_and_sleeps_before_their_time():
    model, cache, events = sleeper(), SleepCache(), []
    rows, mask = torch.stack((tokens(3), tokens(3, seed=1))), torch.tensor([[1, 1, 1], [0, 0, 0]])
    with torch.no_grad(), model.on_sleep(events.append):
        model(rows, attention_mask=mask, cache=cache)
        model.sleep(cache, sleep_passes=3)
        assert seen(events) == [(0, 3, 3)]  # the other row has read nothing
        model(tokens(2 * (L + 1)).view(2, -1), cache=cache)
    assert sorted(seen(events)) == [(0, 3, 3), (0, 3 + L, 2), (1, L, 2)]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"prefill_chunk_size": 2}], ids=str)
def test_generate_tells(settings):
    model, events = sleeper(), []
    with model.on_sleep(events.append):
        model.generate(tokens(L + 1)[None], max_new_tokens=L + 1, do_sample=False, pad_token_id=0, **settings)
    beams = range(settings.get("num_beams", 1))
    assert [told for told in seen(events) if told[1] == 2 * L] == [(beam, 2 * L, 2) for beam in beams]
    assert {told[1] for told in seen(events)} == {L, 2 * L}


def test_a_sleep_is_told_once_in_training_though_it_is_computed_again():
    model, told = sleeper().train(), {}
    for checkpointing in (False, True):
        model.gradient_checkpointing, events = checkpointing, []
        ids = tokens(2 * L + 1)[None]
        with model.on_sleep(events.append):
            model(ids, labels=ids).loss.backward()
        told[checkpointing] = seen(events)
    assert told[True] == told[False] == [(0, L, 2), (0, 2 * L, 2)]


def test_a_hook_changes_nothing_and_ends_with_its_handle():
    model, ids, events, more = sleeper(), tokens(2 * L + 1)[None], [], []
    with torch.no_grad():
        plain = model(ids).logits
        first, second = model.on_sleep(events.append), model.on_sleep(more.append)
        assert torch.equal(model(ids).logits, plain)
        first.remove()
        model(ids)
        second.remove()
        model(ids)
    assert (len(events), len(more)) == (2, 4)


def test_an_event_is_a_value():
    event = SleepEvent(row=0, tokens=1, seconds=0.5, sleep_passes=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.tokens = 2


def test_what_a_hook_raises_ends_the_call_and_leaves_the_cache():
    model, cache = sleeper(), SleepCache()

    def stop(event):
        raise KeyboardInterrupt

    with torch.no_grad():
        model(tokens(3)[None], cache=cache)
        with model.on_sleep(stop), pytest.raises(KeyboardInterrupt):
            model(tokens(2 * L)[None], cache=cache)
        assert (cache.memory.counters[0].seen, cache.memory.counters[0].sleeps, cache.memory.columns) == (3, 0, 3)
        model(tokens(2 * L)[None], cache=cache)
    assert cache.memory.counters[0].sleeps == 2
