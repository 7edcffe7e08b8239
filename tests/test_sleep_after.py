"""`sleep_after`: a row sleeps where the data says, as if the call had ended there and `sleep` had been called."""

import pytest
import torch
from families import exact, tokens
from helpers import L, T, assert_close, assert_same_states, pad, sleeper, states, stream
from reference import reference_run
from test_laws import SPREAD
from torch.nn.functional import cross_entropy

from hf_sleep import SleepCache

# Mid-window, twice in one window, at its end, right after one, and at the very end.
ENDS = (2, 4, L + 4, L + 5, T - 1)


def marked(width, ends=ENDS):
    return torch.isin(torch.arange(width), torch.tensor(ends)).long()


@pytest.mark.parametrize("case", SPREAD[::2])
def test_it_is_a_call_that_ends_there_and_a_sleep(case):
    model, ids = sleeper(case), tokens(T)
    passes = model.config.sleep.sleep_passes
    with exact(), torch.no_grad():
        run = reference_run(model, ids, sleep_after=dict.fromkeys(ENDS, passes))
        out = model(ids[None], sleep_after=marked(T)[None], use_cache=True)
        assert_close(out.logits[0], run.logits, what="logits")
        assert_same_states(states(model, out.cache), run.memory)
        cache, logits, first = SleepCache(), [], 0
        for end in ENDS:
            logits.append(model(ids[None, first : end + 1], cache=cache).logits)
            model.sleep(cache)
            first = end + 1
        assert_close(torch.cat(logits, 1), out.logits)
        assert cache.memory.counters == out.cache.memory.counters
        assert all(
            torch.equal(a, b)
            for one, other in zip(cache.memory.carried, out.cache.memory.carried, strict=True)
            for a, b in zip(one or (), other or (), strict=True)
        )


@pytest.mark.parametrize("case", SPREAD[1::4])
def test_losses_and_gradients_are_those_of_algorithm_1(case):
    model = sleeper(case).train()
    rows, ends = [tokens(T, 1), tokens(L + 5, 2)], [(2, L + 4), (L - 1, L + 1)]
    labels = [torch.where(torch.arange(len(row)) > L + 2, row, -100) for row in rows]
    ids, mask = pad(rows, "left")
    targets, marks = torch.full_like(ids, -100), torch.zeros_like(ids)
    for b, row in enumerate(rows):
        targets[b, -len(row) :], marks[b, -len(row) :] = labels[b], marked(len(row), ends[b])
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradients(loss):
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(parameters, found, strict=True))

    with exact():
        loss = model(ids, attention_mask=mask, labels=targets, sleep_after=marks).loss
        passes = model.config.sleep.sleep_passes
        runs = [
            reference_run(model, row, sleep_after=dict.fromkeys(where, passes))
            for row, where in zip(rows, ends, strict=True)
        ]
        logits = torch.cat([run.logits[:-1] for run in runs])
        expected = cross_entropy(logits, torch.cat([row[1:] for row in labels]))
        assert_close(loss, expected, 1e-9)
        ours, theirs = gradients(loss), gradients(expected)
    for name in parameters:
        assert_close(ours[name], theirs[name], 1e-9, what=name)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", SPREAD[2::8])
def test_each_row_sleeps_at_its_own_marks(case, side):
    model, rows = sleeper(case), [tokens(T, 1), tokens(5, 2), tokens(2 * L, 3)]
    ends = [(3, 2 * L), (0, 4), ()]
    ids, mask = pad(rows, side)
    marks = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        marks[b, mask[b].bool()] = marked(len(row), ends[b])
    with exact(), torch.no_grad():
        cache = SleepCache()
        logits = model(ids, attention_mask=mask, cache=cache, sleep_after=marks).logits
        for b, row in enumerate(rows):
            passes = dict.fromkeys(ends[b], model.config.sleep.sleep_passes)
            run = reference_run(model, row, sleep_after=passes)
            assert_close(logits[b, mask[b].bool()], run.logits, what=f"row {b}")
            assert_same_states(states(model, cache, b), run.memory)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("chunk", [None, 5])
def test_generate_sleeps_at_the_marks_of_its_prompt(use_cache, chunk):
    model, prompt = sleeper("llama/hard/N2/1-3/gate"), tokens(2 * L + 3)
    settings = {"max_new_tokens": L, "do_sample": False, "use_cache": use_cache}
    if chunk is not None and use_cache:
        settings["prefill_chunk_size"] = chunk
    with exact(), torch.no_grad():
        answer = model.generate(prompt[None], sleep_after=marked(len(prompt), (3, L + 2))[None], **settings)[0]
        logits = reference_run(model, answer, sleep_after={3: 2, L + 2: 2}).logits
    assert torch.equal(logits[len(prompt) - 1 : -1].argmax(-1), answer[len(prompt) :])


def test_generate_continues_a_conversation_with_marks_in_its_new_part():
    model, past, turn = sleeper("llama/hard/N2/1-3"), tokens(L + 3), tokens(L + 1, 2)
    whole = torch.cat((past, turn))[None]
    marks = marked(len(turn), (1, L))[None]
    mask = torch.ones_like(whole)
    with exact(), torch.no_grad():
        expected = reference_run(model, whole[0], sleep_after={len(past) + 1: 2, len(past) + L: 2}).logits[-1].argmax()
        for ids, given in ((whole, torch.cat((torch.zeros_like(past)[None], marks), 1)), (turn[None], marks)):
            _, cache = stream(model, past[None], [len(past)])
            answer = model.generate(
                ids, attention_mask=mask, cache=cache, sleep_after=given, max_new_tokens=1, do_sample=False
            )
            assert answer[0, -1] == expected


@pytest.mark.parametrize("width", [5, 7])
def test_generate_refuses_marks_of_another_width(width):
    model, ids = sleeper("llama/hard/N2/all"), tokens(6)[None]
    with pytest.raises(ValueError, match=rf"sleep_after has shape \(1, {width}\): it must be \[B, 6\]"):
        model.generate(ids, sleep_after=torch.zeros(1, width, dtype=torch.long), max_new_tokens=1)


def test_marks_that_cannot_be():
    model, ids = sleeper("llama/hard/N2/all"), tokens(6)[None]
    cache = SleepCache()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    for marks, said in (
        (torch.zeros(1, 5), r"sleep_after has shape \(1, 5\): it must be \(1, 6\)"),
        (torch.full((1, 6), 2), "must hold 0 and 1"),
        (torch.ones(1, 6), "must hold 0 and 1, or be boolean"),
        (torch.tensor([[0, 1, 0, 1, 0, 0]]), "at column 1 of row 0, which is a pad"),
    ):
        with pytest.raises(ValueError, match=said):
            model(ids, attention_mask=mask, cache=cache, sleep_after=marks)
        assert cache.is_empty
