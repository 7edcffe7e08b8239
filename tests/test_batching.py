"""SessionBatch: many sessions in one batch, each answered as alone (law 5); caches joined."""

import threading

import pytest
import torch
from families import exact, tokens
from helpers import EVICTIONS, word_tokenizer, words
from test_session import GREEDY, L, close, copies, same, session, spread
from transformers import GenerationConfig

from hf_sleep import SessionBatch, SleepCache, SleepSession, SleepState, UntilSettled
from hf_sleep.memory import Memory

WORDS = {"do_sample": False, "suppress_tokens": list(range(5))}
LENGTHS = (3, 2 * L + 1, 0, L - 1, 3 * L)


def sessions(family, eviction, passes):
    """Sessions of one model that have read texts of several lengths."""
    model = session(family, eviction, sleep_passes=passes).model
    made = [SleepSession(model, word_tokenizer(), sleep_before_turns="never") for _ in LENGTHS]
    for i, (s, length) in enumerate(zip(made, LENGTHS, strict=True)):
        if length:
            s.read(words(length, i), progress=False)
    return made


@spread
def test_5_sessions_in_a_batch_answer_and_remember_as_each_does_alone(family, eviction, passes):
    """They join at different steps, their windows are full at different ones, and they leave at different ones."""
    with exact():
        together, alone = sessions(family, eviction, passes), sessions(family, eviction, passes)
        counts = [4, L + 3, 7, 1, 2 * L]
        batch, answers = SessionBatch(together[0].model, max_rows=3), []
        for i, (s, count) in enumerate(zip(together, counts, strict=True)):
            answers.append(batch.submit(s, words(2, 10 + i), remember=True, max_new_tokens=count, **WORDS))
            batch.step()
        batch.run()
        for i, (s, other, count) in enumerate(zip(together, alone, counts, strict=True)):
            assert answers[i].result(0) == other.chat(words(2, 10 + i), max_new_tokens=count, **WORDS)
            assert s.report().sleep_passes == other.report().sleep_passes
            assert s._held.chain == other._held.chain
            assert close(s._held.memory, other._held.memory)
        assert sum(s.report().sleeps for s in together) > sum(length // L for length in LENGTHS)


def test_each_sleeps_with_its_own_passes_and_is_asked_without_remembering():
    model, made = session(sleep_passes=1).model, []
    for passes in (1, 3, UntilSettled(cap=4, tolerance=0.0), 3):
        made.append(SleepSession(model, word_tokenizer(), sleep_passes=passes, sleep_before_turns="never"))
    held, batch = [s._held for s in made], SessionBatch(model)
    answers = [batch.submit(s, words(3), max_new_tokens=2 * L, **WORDS) for s in made]
    batch.run()
    assert [a.result(0) for a in answers] == [s.ask(words(3), max_new_tokens=2 * L, **WORDS) for s in made]
    assert [s._held for s in made] == held
    kept = batch.submit(made[1], words(3), max_new_tokens=2 * L, remember=True, **WORDS)
    batch.run()
    assert kept.result(0)
    assert set(made[1].report().sleep_passes) == {3}


def test_an_answer_ends_where_generate_ends_it_and_is_sampled_as_it_samples():
    s = session()
    s.read(words(3))
    said = s.ask(words(2), max_new_tokens=20, **WORDS).split()
    stop = s.tokenizer.convert_tokens_to_ids(said[3])
    s.model.generation_config.eos_token_id = stop
    batch = SessionBatch(s.model)
    answer = batch.submit(s, words(2), max_new_tokens=20, **WORDS)
    batch.run()
    assert answer.result(0) == s.ask(words(2), max_new_tokens=20, **WORDS)
    assert len(answer.result(0).split()) <= 4
    s.model.generation_config.eos_token_id = None
    how = {"do_sample": True, "temperature": 1.5, "top_k": 5, "max_new_tokens": 12, "suppress_tokens": list(range(5))}
    a, b, c = (batch.submit(s, words(2), seed=seed, **how) for seed in (1, 1, 2))
    batch.run()
    assert a.result(0) == b.result(0) != c.result(0)
    cold = batch.submit(s, words(2), seed=3, **how | {"top_k": 1})
    batch.run()
    assert cold.result(0) == s.ask(words(2), max_new_tokens=12, **WORDS)
    # What generate draws from where nothing more is said: the likeliest 50.
    del how["top_k"]
    likeliest = GenerationConfig._get_default_generation_params()["top_k"]
    a, b = (batch.submit(s, words(2), seed=4, **how, **more) for more in ({}, {"top_k": likeliest}))
    batch.run()
    assert batch._config(how, set()).top_k == likeliest
    assert a.result(0) == b.result(0)


def test_what_cannot_be_asked_is_refused_and_stops_nobody():
    s, other = session(), session()
    batch = SessionBatch(s.model)
    good = batch.submit(s, words(2), **GREEDY)
    for question, settings, message in (
        ("", {}, "must be a string that says something"),
        ("w1", {"beam": 2}, "beam cannot be set in a batch of sessions: seed and bad_words_ids, "),
        ("w1", {"num_beams": 2}, "num_beams cannot be set in a batch"),
        ("w1", {"stop_strings": ["w2"]}, "stop_strings cannot be set in a batch"),
    ):
        with pytest.raises(ValueError, match=message):
            batch.submit(s, question, **settings)
    with pytest.raises(ValueError, match="another model"):
        batch.submit(other, "w1")
    with pytest.raises(ValueError, match="max_rows=0"):
        SessionBatch(s.model, 0)
    changed = batch.submit(s, words(3), remember=True, **GREEDY)
    batch.step()
    s.read("w1")
    batch.run()
    assert good.result(0)
    assert isinstance(changed.exception(0), RuntimeError)
    head = s.model.lm.lm_head.forward
    s.model.lm.lm_head.forward = None
    broken = [batch.submit(s, words(n), **GREEDY) for n in (1, 2)]
    batch.run()
    assert all(isinstance(answer.exception(0), TypeError) for answer in broken)
    s.model.lm.lm_head.forward = head
    good = batch.submit(s, words(2), **GREEDY)
    batch.run()
    assert good.result(0) == s.ask(words(2), **GREEDY)


@pytest.mark.parametrize("eviction", EVICTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_joined_caches_are_the_batch(family, eviction):
    model = session(family, eviction).model
    ids = [tokens(n, n)[None] for n in (3, 2 * L + 1, L, L + 5)]
    with torch.no_grad():
        caches = [model(row, use_cache=True).cache for row in ids]
        kept = [SleepState.from_cache(model, cache) for cache in caches]
        joined = SleepCache.cat(caches)
        assert [row.seen for row in joined.memory.counters] == [3, 2 * L + 1, L, L + 5]
        following = tokens(4 * (L + 2), 9).view(4, -1)
        past = torch.zeros(4, 2 * L + 1, dtype=torch.long)
        for row, one in zip(past, ids, strict=True):
            row[past.shape[1] - one.shape[1] :] = 1
        said = model(following, attention_mask=torch.cat((past, torch.ones_like(following)), 1), cache=joined).logits
        for b, cache in enumerate(caches):
            fork = cache.fork()
            alone = model(following[b : b + 1], cache=fork).logits
            assert torch.allclose(said[b : b + 1], alone, rtol=0, atol=1e-9)
            row = joined.fork()
            row.batch_select_indices(torch.tensor([b]))
            assert _same_where_it_counts(row.memory.alone(), fork.memory)
    for cache, state in zip(caches, kept, strict=True):
        now = SleepState.from_cache(model, cache)
        assert same(list(now.tensors.values()), list(state.tensors.values()))
    two = SleepCache.cat([SleepCache.cat(caches[:2]), caches[2]])
    assert [row.seen for row in two.memory.counters] == [3, 2 * L + 1, L]


def _same_where_it_counts(a: Memory, b: Memory) -> bool:
    """Equal but for what pads a row that is shorter than its neighbours."""
    assert a.counters == b.counters
    found = []
    for x, y in zip(a.carried, b.carried, strict=True):
        for t, u in zip(x or (), y or (), strict=True):
            width = min(t.shape[-2], u.shape[-2])
            found.append(torch.allclose(t[..., :width, :], u[..., :width, :], rtol=0, atol=1e-9))
    return all(found)


def test_what_cannot_be_joined_is_refused():
    s, other = session(), session()
    s.read(words(3))
    other.read(words(3))
    caches = [x.steps.cache(x._held.memory) for x in (s, other)]
    with pytest.raises(ValueError, match="1 of the 2 given are empty"):
        SleepCache.cat([caches[0], SleepCache()])
    with pytest.raises(ValueError, match="cat takes caches"):
        SleepCache.cat([])
    with pytest.raises(ValueError, match="written by several models"):
        SleepCache.cat(caches)
    before = copies(s)
    assert SleepCache.cat(caches[:1]).memory.counters == s._held.memory.counters
    assert same(copies(s), before)


def test_other_threads_sleeps_are_theirs():
    s, other = session(), session()
    other = SleepSession(s.model, word_tokenizer())
    other.read(words(4))
    ended = threading.Event()

    def sleep_on():
        while not ended.is_set():
            other.fork().sleep()

    thread = threading.Thread(target=sleep_on)
    thread.start()
    try:
        batch = SessionBatch(s.model)
        twin = s.fork()
        answer = batch.submit(twin, words(2), remember=True, max_new_tokens=6, **WORDS)
        batch.run()
    finally:
        ended.set()
        thread.join()
    assert answer.result(0)
    assert twin.report().sleeps == len(twin.report().sleep_passes) == 0


def test_a_bad_turn_fails_alone_and_a_cancelled_one_is_answered():
    s = session()
    batch = SessionBatch(s.model)
    good, bad, worse = (batch.submit(s, words(2), **GREEDY) for _ in range(3))

    def fails(ids, scores):
        raise RuntimeError("mine")

    def fails_later(ids, scores):
        return scores if ids.shape[1] < len(batch.turns[0].prompt) + 2 else fails(ids, scores)

    batch.waiting[1].processors, batch.waiting[2].processors = fails, fails_later
    assert not good.cancel()
    batch.run()
    assert good.result(0) == s.ask(words(2), **GREEDY)
    assert "mine" in str(bad.exception(0)) == str(worse.exception(0))


def test_an_eos_of_one_s_own_ends_an_answer_as_in_ask():
    s = session()
    said = s.ask(words(2), max_new_tokens=12, **WORDS).split()
    how = WORDS | {"max_new_tokens": 12, "eos_token_id": s.tokenizer.convert_tokens_to_ids(said[2])}
    batch = SessionBatch(s.model)
    answer = batch.submit(s, words(2), remember=True, **how)
    twin = s.fork()
    batch.run()
    assert answer.result(0) == twin.ask(words(2), **how)
    assert len(answer.result(0).split()) == 1 + said.index(said[2])


def test_a_session_waits_with_its_idle_sleep_until_its_turn_is_over():
    s = session(settings={"sleep_before_turns": "never"})
    s.read(words(3))
    batch = SessionBatch(s.model)
    s.sleep_when_idle(0.0)
    answer = batch.submit(s, words(2), remember=True, **GREEDY | {"max_new_tokens": 2})
    s._idle._timer.join(10)
    before = s.report().sleeps
    batch.run()
    assert answer.result(0)
    s._idle._timer.join(10)
    assert s.report().sleeps == before + 1
    s.sleep_when_idle(None)


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": -3}, {"seed": "one"}], ids=str)
def test_a_refused_turn_leaves_the_idle_sleep_as_it_was(settings):
    s = session(settings={"sleep_before_turns": "never"})
    s.read(words(3))
    batch = SessionBatch(s.model)
    with pytest.raises((ValueError, RuntimeError), match=r"strictly positive|manual_seed expected"):
        batch.submit(s, words(2), do_sample=True, **settings)
    assert _sleeps_when_idle(s)


@pytest.mark.parametrize("call", [0, 1], ids=["joins", "speaks"])
def test_ctrl_c_ends_the_turn_that_it_meets_and_those_that_wait_are_answered(call, monkeypatch):
    first = session(settings={"sleep_before_turns": "never"})
    second = first.fork()
    for s in (first, second):
        s.read(words(3))
    batch = SessionBatch(first.model, max_rows=1)
    met, waits = (batch.submit(s, words(2), **GREEDY) for s in (first, second))
    forward, calls = first.model.forward, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(first.model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batch.run()
    assert isinstance(met.exception(0), KeyboardInterrupt)
    assert not waits.done()
    batch.run()
    assert waits.result(0) == second.ask(words(2), **GREEDY)
    assert _sleeps_when_idle(first)


def _sleeps_when_idle(s: SleepSession) -> bool:
    before = s.report().sleeps
    s.sleep_when_idle(0.0)
    s._idle._timer.join(10)
    s.sleep_when_idle(None)
    return s.report().sleeps == before + 1
