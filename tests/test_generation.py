"""Stock `generate` on a model that sleeps as it goes, and what of `generate` cannot work with memory."""

import copy
import dataclasses
import functools
import pickle
import threading
import warnings
from collections import Counter
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from families import VOCAB, make_base, make_model, sleep_config, tokens
from helpers import pad
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, StoppingCriteriaList
from transformers.generation import BaseStreamer
from transformers.generation.utils import DeferredStopCheck

from hf_sleep import SleepCache, SleepForCausalLM
from hf_sleep.bases.decoder import Decoder
from hf_sleep.compat import CACHE
from hf_sleep.layers import FastWeightBlock
from hf_sleep.memory import mark_of

L = 5
CASES = [
    (family, eviction)
    for family in ("llama", "gemma3", "qwen3_next", "mistral_window")
    for eviction in ("hard", "sliding")
]
GREEDY = {"do_sample": False, "pad_token_id": 0}
every_case = pytest.mark.parametrize(("family", "eviction"), CASES)


@functools.cache
def sleeper(family: str, eviction: str, **fields) -> SleepForCausalLM:
    """Make a model in float64, so that two ways to the same logits choose the same token. Nothing may change it."""
    defaults = {"window_size": L, "eviction": eviction, "num_sink_tokens": int(eviction == "sliding")}
    return make_model(family, sleep_config(family, **(defaults | fields)), torch.double)


def assert_greedy(model: SleepForCausalLM, ids: torch.Tensor, said: int, **kwargs) -> None:
    """The last `said` tokens are each the argmax of a full forward without a cache over what comes before them."""
    with torch.no_grad():
        expected = model(ids, **kwargs).logits[:, -said - 1 : -1].argmax(-1)
    assert torch.equal(ids[:, -said:], expected)


@every_case
def test_greedy_is_the_argmax_of_a_full_forward(family, eviction):
    model, ids = sleeper(family, eviction), torch.stack((tokens(2 * L + 1, 1), tokens(2 * L + 1, 2)))
    said = model.generate(ids, max_new_tokens=L + 2, **GREEDY)
    assert torch.equal(said[:, : 2 * L + 1], ids)
    assert said.shape[1] == 3 * L + 3
    assert_greedy(model, said, L + 2)


@every_case
def test_sampling_needs_no_cache_and_repeats_with_its_seed(family, eviction):
    model, ids = sleeper(family, eviction), torch.stack((tokens(L + 2, 1), tokens(L + 2, 2)))

    def sample(seed, **kwargs):
        torch.manual_seed(seed)
        settings = {"do_sample": True, "top_k": 20, "top_p": 0.95, "temperature": 1.5, "num_return_sequences": 2}
        return model.generate(ids, max_new_tokens=L + 2, pad_token_id=0, **settings, **kwargs)

    first = sample(3)
    assert first.shape == (4, 2 * L + 4)
    assert torch.equal(sample(3), first)
    assert torch.equal(sample(3, use_cache=False), first)
    assert not torch.equal(sample(4), first)


@every_case
def test_beams_take_their_memory_with_them(family, eviction):
    model, ids = sleeper(family, eviction), torch.stack((tokens(L + 3, 1), tokens(L + 3, 2)))
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": L + 2, "return_dict_in_generate": True}
    # The test is of something only if beams do change places while the model sleeps.
    with mock.patch.object(SleepCache, "reorder_cache", autospec=True, side_effect=SleepCache.reorder_cache) as moved:
        cached = model.generate(ids, output_scores=True, **settings, **GREEDY)
    assert any(call.args[1].tolist() != list(range(6)) for call in moved.call_args_list)
    plain = model.generate(ids, output_scores=True, use_cache=False, **settings, **GREEDY)
    assert torch.equal(cached.sequences, plain.sequences)
    assert torch.allclose(cached.sequences_scores, plain.sequences_scores, atol=1e-5)
    greedy = model.generate(ids, max_new_tokens=L + 2, **GREEDY)
    assert not torch.equal(cached.sequences[::2], greedy)


@every_case
def test_a_left_padded_row_is_what_it_is_alone(family, eviction):
    model, rows = sleeper(family, eviction), [tokens(n, n) for n in (2 * L + 1, 1, L)]
    ids, mask = pad(rows, "left")
    answers = model.generate(ids, attention_mask=mask, max_new_tokens=L + 2, **GREEDY)[:, ids.shape[1] :]
    for row, answer in zip(rows, answers, strict=True):
        assert torch.equal(model.generate(row[None], max_new_tokens=L + 2, **GREEDY)[0, len(row) :], answer)


@every_case
def test_beams_of_a_padded_row_are_its_beams_alone(family, eviction):
    model, rows = sleeper(family, eviction), [tokens(2 * L + 1, 1), tokens(2, 2)]
    ids, mask = pad(rows, "left")
    settings = {"num_beams": 2, "max_new_tokens": L + 2, **GREEDY}
    answers = model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    for row, answer in zip(rows, answers, strict=True):
        assert torch.equal(model.generate(row[None], **settings)[0, len(row) :], answer)


@pytest.mark.parametrize("chunk", [None, L + 2])
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_it_generates_from_embeddings(eviction, chunk):
    model, ids = sleeper("llama", eviction), tokens(2 * L + 1)[None]
    embeds, settings = (
        model.get_input_embeddings()(ids),
        {"max_new_tokens": L + 2, **GREEDY, "prefill_chunk_size": chunk},
    )
    said = model.generate(inputs_embeds=embeds, **settings)
    assert torch.equal(said, model.generate(ids, **settings)[:, 2 * L + 1 :])


@every_case
@pytest.mark.parametrize("chunk", [3, L, L + 2])
def test_a_prompt_may_be_read_in_chunks(family, eviction, chunk):
    model, rows = sleeper(family, eviction), [tokens(2 * L + 1, 1), tokens(L - 1, 2)]
    for some in (rows[:1], rows):
        ids, mask = pad(some, "left")
        settings = {"attention_mask": mask, "max_new_tokens": 4, **GREEDY}
        assert torch.equal(model.generate(ids, prefill_chunk_size=chunk, **settings), model.generate(ids, **settings))


@every_case
def test_turns_on_a_returned_cache_are_one_conversation(family, eviction):
    model, ids = sleeper(family, eviction), torch.stack((tokens(L + 2, 1), tokens(L + 2, 2)))
    cache, lengths = None, []
    settings = {"max_new_tokens": 4, "return_dict_in_generate": True, **GREEDY}
    for turn in range(3):
        ids = ids if cache is None else torch.cat((ids, torch.stack([tokens(3, 10 * turn + r) for r in (0, 1)])), 1)
        # Without a mask generate would take what it said for pads where it said the pad token.
        out = model.generate(ids, attention_mask=torch.ones_like(ids), cache=cache, **settings)
        assert torch.equal(out.sequences[:, :-4], ids)
        assert_greedy(model, out.sequences, 4)
        ids, cache = out.sequences, out.cache
        lengths.append(cache.get_seq_length())
        assert {row.seen for row in cache.memory.counters} == {cache.get_seq_length()}
    # The last token that was said is not read yet; it is read with the next turn.
    assert lengths == [L + 2 + 3, L + 2 + 10, L + 2 + 17]


@every_case
def test_the_number_of_passes_is_a_setting_of_the_call(family, eviction):
    model, ids = sleeper(family, eviction), torch.stack([tokens(3 * L, seed) for seed in range(6)])
    settings = {"max_new_tokens": L + 2, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    three = model.generate(ids, sleep_passes=3, **settings)
    configured = sleeper(family, eviction, sleep_passes=3).generate(ids, **settings)
    assert torch.equal(three.sequences, configured.sequences)
    assert all(torch.equal(a, b) for a, b in zip(three.logits, configured.logits, strict=True))
    one = model.generate(ids, sleep_passes=1, **settings)
    assert not torch.equal(one.sequences, three.sequences)
    with pytest.raises(ValueError, match="sleep_passes=0: it must be an integer of at least 1"):
        model.generate(ids, sleep_passes=0, **settings)


@every_case
def test_rows_sleep_while_they_generate(family, eviction):
    model = sleeper(family, eviction)
    ids, mask = pad([tokens(2 * L, 1), tokens(2, 2)], "left")
    out = model.generate(ids, attention_mask=mask, max_new_tokens=2 * L + 1, return_dict_in_generate=True, **GREEDY)
    rows = out.cache.memory.counters
    assert [(row.seen, row.sleeps, row.fill) for row in rows] == [(4 * L, 3, L), (2 * L + 2, 2, 2)]


def test_the_stream_gets_every_token():
    class Listener(BaseStreamer):
        def __init__(self):
            self.heard, self.ended = [], False

        def put(self, value):
            assert not self.ended
            self.heard += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, ids, listener = sleeper("llama", "hard"), tokens(L + 2)[None], Listener()
    said = model.generate(ids, max_new_tokens=2 * L, streamer=listener, **GREEDY)
    assert listener.ended
    assert listener.heard == said[0].tolist()


class Watching(BaseStreamer):
    """A streamer that is told of sleeps: where they came among the tokens."""

    def __init__(self, meanwhile=None):
        self.heard, self.meanwhile = [], meanwhile

    def put(self, value):
        self.heard += value.flatten().tolist()

    def on_sleep(self, event):
        self.heard.append(event)
        if self.meanwhile is not None:
            self.meanwhile()

    def end(self):
        pass


def test_a_streamer_is_told_of_sleeps_where_they_come():
    model, ids, watching = sleeper("llama", "hard"), tokens(2 * L + 1)[None], Watching()
    events = []
    with model.on_sleep(events.append):
        said = model.generate(ids, max_new_tokens=2 * L, streamer=watching, **GREEDY)
    assert [event.tokens for event in events] == [L, 2 * L, 3 * L]
    assert [one for one in watching.heard if not isinstance(one, int)] == events
    assert [one for one in watching.heard if isinstance(one, int)] == said[0].tolist()
    # The prompt is put before it is read; a later sleep comes when the token after a full window is there.
    assert [watching.heard.index(event) for event in events] == [2 * L + 1, 2 * L + 2, 3 * L + 3]
    assert not model._sleep_hooks


def test_a_streamer_is_told_of_its_own_sleeps_alone():
    """Another thread's call of the same model is another stream's."""
    model, ids = sleeper("llama", "hard"), tokens(2 * L + 1)[None]

    def another_call():
        thread = threading.Thread(target=model.generate, args=(tokens(L + 3)[None],), kwargs={"max_new_tokens": 1})
        thread.start()
        thread.join()

    watching = Watching(another_call)
    model.generate(ids, max_new_tokens=2, streamer=watching, **GREEDY)
    assert [one.tokens for one in watching.heard if not isinstance(one, int)] == [L, 2 * L]


def test_what_a_streamer_raises_at_a_sleep_ends_the_call():
    def fail():
        raise RuntimeError("enough")

    model, cache = sleeper("llama", "hard"), SleepCache()
    with pytest.raises(RuntimeError, match="enough"):
        model.generate(tokens(2 * L)[None], cache=cache, max_new_tokens=2, streamer=Watching(fail), **GREEDY)
    assert cache.is_empty
    assert not model._sleep_hooks


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_it_stops_where_it_is_told_to(eviction):
    model, ids = sleeper("llama", eviction), tokens(L + 2)[None]
    said = model.generate(ids, max_new_tokens=3 * L, **GREEDY)
    assert torch.equal(model.generate(ids, max_length=2 * L + 4, **GREEDY), said[:, : 2 * L + 4])
    criteria = StoppingCriteriaList([lambda seen, scores, **_: torch.tensor([seen.shape[1] >= 2 * L + 1])])
    assert torch.equal(
        model.generate(ids, max_new_tokens=3 * L, stopping_criteria=criteria, **GREEDY)[0], said[0, : 2 * L + 1]
    )
    eos = said[0, 2 * L + 3].item()
    first = (said[0, L + 2 :] == eos).nonzero()[0, 0].item() + L + 2
    assert torch.equal(model.generate(ids, max_new_tokens=3 * L, eos_token_id=eos, **GREEDY), said[:, : first + 1])


REFUSED = {
    "prompt lookup": (lambda: {"prompt_lookup_num_tokens": 2}, "not supported with stateful models, such as Sleep"),
    "early exit": (lambda: {"assistant_early_exit": 1}, "not supported with stateful models, such as Sleep"),
    "assistant": (lambda: {"assistant_model": make_base("llama")}, "not supported with stateful models, such as Sleep"),
    "static and a cache": (
        lambda: {"cache_implementation": "static", CACHE: SleepCache()},
        "cache_implementation='static' and a SleepCache contradict each other",
    ),
    "quantized": (
        lambda: {"cache_implementation": "quantized"},
        "='quantized' cannot hold fast weights: leave it unset",
    ),
    "offloaded": (
        lambda: {"cache_implementation": "offloaded"},
        "='offloaded' cannot hold fast weights: leave it unset",
    ),
    "DynamicCache": (lambda: {"cache": DynamicCache()}, "is a DynamicCache: .* needs a hf_sleep.SleepCache"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_lose_the_memory_is_refused(case):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        sleeper("llama", "hard").generate(tokens(L)[None], max_new_tokens=3, **settings(), **GREEDY)


def test_it_cannot_be_the_assistant_of_another():
    target, model = make_base("llama"), sleeper("llama", "hard")
    with pytest.raises(
        ValueError, match=r"SleepForCausalLM cannot be the assistant_model of another model: .* rewound"
    ):
        target.generate(tokens(L)[None], max_new_tokens=3, assistant_model=model, **GREEDY)
    with pytest.raises(ValueError, match="not supported with stateful models, such as SleepForCausalLM"):
        model.generate(tokens(L)[None], max_new_tokens=3, assistant_model=model, **GREEDY)


def test_continuous_batching_is_refused():
    model = sleeper("llama", "hard")
    for call in (
        lambda: model.generate(tokens(L)[None], max_new_tokens=3, cache_implementation="paged", **GREEDY),
        lambda: model.generate_batch([tokens(L).tolist()], max_new_tokens=3),
        lambda: model.init_continuous_batching(),
    ):
        with pytest.raises(NotImplementedError, match="cannot hold fast weights: use generate"):
            call()
    config = GenerationConfig(cache_implementation="paged", max_new_tokens=3)
    with pytest.raises(ValueError, match="cache_implementation='paged' cannot hold fast weights"):
        model.generate(tokens(L)[None], generation_config=config)
    base = make_base("llama")
    base.set_attn_implementation("paged|eager")
    with pytest.raises(ValueError, match=r"attn_implementation='paged\|eager' reads a paged KV cache"):
        SleepForCausalLM.from_base(base, sleep_config("llama"))


# The cache, as generate and users handle it.


def read(model, ids, cache, **kwargs):
    with torch.no_grad():
        return model(ids, cache=cache, **kwargs).logits


def two_rows(model) -> SleepCache:
    """One row has slept and is in the middle of a window, the other has read two tokens."""
    ids, mask = pad([tokens(2 * L + 3, 1), tokens(2, 2)], "left")
    cache = SleepCache()
    read(model, ids, cache, attention_mask=mask)
    return cache


@every_case
@pytest.mark.parametrize("rows", [[1, 0], [0, 0, 1]])
def test_selected_rows_go_on_as_before(family, eviction, rows):
    model, more = sleeper(family, eviction), torch.stack((tokens(L + 2, 8), tokens(L + 2, 9)))
    expected = read(model, more, two_rows(model))
    for operation in ("batch_select_indices", "reorder_cache"):
        cache = two_rows(model)
        getattr(cache, operation)(torch.tensor(rows))
        assert cache.batch_size == len(rows)
        # What a batch computes may round differently from what a row of it computes.
        assert torch.allclose(read(model, more[rows], cache), expected[rows], atol=1e-5)


@every_case
def test_repeated_rows_go_on_as_before(family, eviction):
    model, more = sleeper(family, eviction), torch.stack((tokens(L + 2, 8), tokens(L + 2, 9)))
    expected, cache = read(model, more, two_rows(model)), two_rows(model)
    cache.batch_repeat_interleave(3)
    assert [row.seen for row in cache.memory.counters] == [2 * L + 3] * 3 + [2] * 3
    repeated = more.repeat_interleave(3, 0)
    assert torch.allclose(read(model, repeated, cache), expected.repeat_interleave(3, 0), atol=1e-5)


@every_case
def test_a_copied_cache_is_independent(family, eviction):
    model, more = sleeper(family, eviction), torch.stack((tokens(L + 2, 8), tokens(L + 2, 9)))
    cache = two_rows(model)
    twin, fork = copy.deepcopy(cache), cache.fork()
    expected = read(model, more, fork)
    for other in (twin, cache):
        assert other.get_seq_length() == 2 * L + 3
        assert [(row.seen, row.sleeps) for row in other.memory.counters] == [(2 * L + 3, 2), (2, 0)]
    # A fork shares tensors, which nobody writes in place; a deep copy does not.
    cache.memory.map(lambda t: t.fill_(7))
    assert torch.equal(read(model, more, twin), expected)
    assert not torch.equal(read(model, more, cache), expected)
    cache.reset()
    assert cache.is_empty
    assert twin.get_seq_length() == fork.get_seq_length() == 3 * L + 5


def test_a_cache_cannot_be_cropped():
    cache = two_rows(sleeper("llama", "hard"))
    with pytest.raises(NotImplementedError, match=r"fast weights cannot be rewound\. Keep `cache\.fork"):
        cache.crop(1)
    assert cache.get_seq_length() == 2 * L + 3
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.activate_past_recording()


# Rows that end before their neighbours, and what a mask says of the past.


def two_turns(model, rows, question, **settings):
    """Two turns of a batch, as a chat program makes them: what is said in the second, and the cache."""
    ids, mask = pad(rows, "left")
    settings = {"max_new_tokens": 2 * L, "return_dict_in_generate": True, **GREEDY, **settings}
    out = model.generate(ids, attention_mask=mask, **settings)
    said = torch.ones(len(rows), out.sequences.shape[1] - ids.shape[1], dtype=torch.long)
    for row, answer in zip(said, out.sequences[:, ids.shape[1] :], strict=True):
        if len(end := (answer == settings["eos_token_id"]).nonzero()):
            row[int(end[0]) + 1 :] = 0
    more = question.expand(len(rows), -1)
    mask = torch.cat((mask, said, torch.ones_like(more)), 1)
    ids = torch.cat((out.sequences, more), 1)
    settings |= {"eos_token_id": None, "stopping_criteria": None, "max_new_tokens": L}
    out = model.generate(ids, attention_mask=mask, cache=out.cache, output_logits=True, **settings)
    return out, said.sum(1).tolist()


@every_case
@pytest.mark.parametrize("way", ["greedy", "sampling", "criterion", "uncached"])
def test_a_row_that_ends_early_goes_on_as_it_would_alone(family, eviction, way):
    model, question = sleeper(family, eviction), tokens(4, 9)[None]
    rows = [tokens(L + 4, 1), tokens(L + 1, 2)]
    answers = [model.generate(row[None], max_new_tokens=2 * L, **GREEDY)[0, len(row) :].tolist() for row in rows]
    # Row 0 ends at least three tokens before row 1 does, if it ends at all.
    end = next(token for token in answers[0][: L + 2] if token not in answers[1][: answers[0].index(token) + 3])
    settings = {"eos_token_id": end}
    if way == "sampling":
        settings |= {"do_sample": True, "top_k": 1}
    elif way == "criterion":
        ended = StoppingCriteriaList([lambda ids, scores, **_: ids[:, -1] == end])
        settings["stopping_criteria"] = ended
    elif way == "uncached":
        ids, mask = pad(rows, "left")
        settings |= {"max_new_tokens": 2 * L, "pad_token_id": 0, "attention_mask": mask}
        assert torch.equal(model.generate(ids, use_cache=False, **settings), model.generate(ids, **settings))
        return
    out, lengths = two_turns(model, rows, question, **settings)
    assert lengths[0] <= lengths[1] - 3
    for b, row in enumerate(rows):
        alone, (length,) = two_turns(model, [row], question, **settings)
        assert length == lengths[b]
        assert torch.equal(alone.sequences[0, -L:], out.sequences[b, -L:])
        assert torch.allclose(alone.logits[0][0], out.logits[0][b], atol=1e-5)
        assert alone.cache.memory.counters[0] == out.cache.memory.counters[b]


def test_a_row_without_an_end_token_speaks_on():
    """A criterion alone ends a batch when all rows met it, and what they say until then is their answer."""
    model, ids = sleeper("llama", "hard"), torch.stack((tokens(L, 1), tokens(L, 2)))
    criteria = StoppingCriteriaList([lambda seen, scores, **_: torch.tensor([True, seen.shape[1] >= 2 * L])])
    settings = {"max_new_tokens": 3 * L, "return_dict_in_generate": True, **GREEDY}
    out = model.generate(ids, stopping_criteria=criteria, **settings)
    assert out.sequences.shape[1] == 2 * L
    assert [row.seen for row in out.cache.memory.counters] == [2 * L - 1] * 2
    assert_greedy(model, out.sequences, L)


def padded_cache(model) -> SleepCache:
    """Row 0 has a token in all 7 columns, row 1 from column 3 to 5."""
    ids, mask = torch.stack((tokens(7, 1), tokens(7, 2))), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = mask[1, 6:] = 0
    cache = SleepCache()
    read(model, ids[:, :4], cache, attention_mask=mask[:, :4])
    read(model, ids[:, 4:], cache, attention_mask=mask[:, 4:])
    return cache


AGREES = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0]])
OTHER_PASTS = {
    "no pads": (torch.ones(2, 7, dtype=torch.long), "row 1 has 7 tokens in the past, and cache has read 3"),
    "one more": (AGREES.index_fill(1, torch.tensor([2]), 0), "row 0 has 6 tokens in the past, and cache has read 7"),
    "moved": (
        AGREES.roll(1, 1).index_fill(0, torch.tensor([0]), 1),
        "the pads in the past of row 1 stand at other columns",
    ),
}


@pytest.mark.parametrize("case", OTHER_PASTS)
def test_a_mask_must_agree_with_what_was_read(case):
    model, more, now = sleeper("llama", "hard"), tokens(4).view(2, 2), torch.ones(2, 2, dtype=torch.long)
    past, message = OTHER_PASTS[case]
    cache = padded_cache(model)
    expected = read(model, more, cache.fork())
    ids, mask = torch.cat((torch.ones(2, 7, dtype=torch.long), more), 1), torch.cat((past, now), 1)
    for call in (
        lambda: read(model, more, cache, attention_mask=mask),
        lambda: model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=2, **GREEDY),
    ):
        with pytest.raises(ValueError, match=rf"attention_mask says that {message}.*again with an empty SleepCache"):
            call()
    assert torch.equal(read(model, more, cache, attention_mask=torch.cat((AGREES, now), 1)), expected)


def test_selected_rows_remember_which_columns_were_pads():
    model, more = sleeper("llama", "hard"), tokens(6).view(3, 2)
    cache = padded_cache(model)
    cache.select_rows(torch.tensor([1, 0, 1]))
    mask = torch.cat((AGREES[[1, 0, 1]], torch.ones_like(more)), 1)
    read(model, more, cache, attention_mask=mask)
    with pytest.raises(ValueError, match="row 0 has 9 tokens in the past, and cache has read 5"):
        read(model, more, cache, attention_mask=torch.ones(3, 11, dtype=torch.long))


def test_where_only_the_number_of_tokens_is_known_that_must_agree():
    """Forget which columns were pads, as state files did at first."""
    model, more, now = sleeper("llama", "hard"), tokens(4).view(2, 2), torch.ones(2, 2, dtype=torch.long)
    cache = padded_cache(model)
    unknown = tuple(dataclasses.replace(row, pads=None) for row in cache.memory.counters)
    cache.memory = dataclasses.replace(cache.memory, counters=unknown)
    with pytest.raises(ValueError, match="row 1 has 7 tokens in the past, and cache has read 3"):
        read(model, more, cache, attention_mask=torch.ones(2, 9, dtype=torch.long))
    read(model, more, cache, attention_mask=torch.cat((AGREES, now), 1))


def test_the_mark_of_columns_tells_sets_apart_and_adds_up():
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randperm(40, generator=generator)[:n].sort().values for n in (0, 1, 2, 5, 20, 39) for _ in range(300)]
    distinct = {tuple(columns.tolist()) for columns in sets}
    assert len({mark_of(torch.tensor(columns, dtype=torch.long)) for columns in distinct}) == len(distinct)
    for columns in sets:
        assert mark_of(columns) == (mark_of(columns[::2]) + mark_of(columns[1::2])) % 2**64


def test_what_is_noted_of_pads_does_not_grow_with_what_was_read():
    """Ragged chunks without end: whatever their number, the state's file keeps its size."""
    model, cache, sizes = sleeper("llama", "hard"), SleepCache(), []
    mask = torch.tensor([[1, 1], [0, 1]])
    for _ in range(100 * L):
        read(model, tokens(4).view(2, 2), cache, attention_mask=mask)
        sizes.append(len(pickle.dumps([dataclasses.astuple(row) for row in cache.memory.counters])))
    assert max(sizes[L:]) <= sizes[0] + 32
    past = torch.cat([mask] * (100 * L) + [mask], 1)
    read(model, tokens(4).view(2, 2), cache.fork(), attention_mask=past)
    with pytest.raises(ValueError, match="the pads in the past of row 1 stand at other columns"):
        read(model, tokens(4).view(2, 2), cache, attention_mask=torch.cat((past.roll(1, 1)[:, :-2], mask), 1))


def test_a_conversation_that_was_partly_read_is_read_on():
    model, ids = sleeper("llama", "hard"), tokens(2 * L + 3)[None]
    settings = {"max_new_tokens": L, "return_dict_in_generate": True, **GREEDY}
    expected = model.generate(ids, **settings)
    for read_before in (0, 1, L, 2 * L + 2):
        cache = SleepCache()
        if read_before:
            read(model, ids[:, :read_before], cache)
        out = model.generate(ids, cache=cache, **settings)
        assert out.cache is cache
        assert torch.equal(out.sequences, expected.sequences)
        assert cache.memory.counters == expected.cache.memory.counters
        assert cache.memory.columns == cache.memory.counters[0].seen == 3 * L + 2


def test_new_text_alone_needs_a_mask_over_what_was_read():
    model, old, new = sleeper("llama", "hard"), tokens(2 * L + 3, 1)[None], tokens(4, 2)[None]
    memory, settings = SleepCache(), {"max_new_tokens": L, **GREEDY}
    read(model, old, memory)
    expected = model.generate(torch.cat((old, new), 1), **settings)[:, 2 * L + 3 :]
    mask = torch.ones(1, 2 * L + 7, dtype=torch.long)
    assert torch.equal(model.generate(new, cache=memory.fork(), attention_mask=mask, **settings), expected)
    before = copy.deepcopy(memory)
    for wrong in (None, mask[:, :4], mask[:, 1:]):
        message = (
            r"cache has read 13 columns, the input has 4 and .*attention_mask=torch.ones\(1, 17, dtype=torch.long\)"
        )
        with pytest.raises(ValueError, match=message):
            model.generate(new, cache=memory, attention_mask=wrong, **settings)
    with pytest.raises(ValueError, match="cache has read all 13 columns of the input: there is nothing new"):
        model.generate(old, cache=memory, **settings)
    embeds = model.get_input_embeddings()(new)
    with pytest.raises(ValueError, match="cache has read 13 columns, the input has 4"):
        model.generate(inputs_embeds=embeds, cache=memory, attention_mask=mask, **settings)
    with pytest.raises(ValueError, match="use_cache=False and a cache contradict each other"):
        model.generate(torch.cat((old, new), 1), cache=memory, use_cache=False, **settings)
    assert memory.memory.counters == before.memory.counters
    assert memory.memory.columns == before.memory.columns


# Settings of generate.


def letters() -> PreTrainedTokenizerFast:
    """A token per letter."""
    alphabet = "?Ġabcdefghijklmnopqrstuvwxyz.ABCDEFGHIJKLMNOPQRSTUVWXYZ012345"[:VOCAB]
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, [], unk_token="?"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="?", unk_token="?")


@pytest.mark.parametrize("beams", [1, 2])
def test_it_stops_at_a_string(beams):
    model, ids, tokenizer = sleeper("llama", "hard"), tokens(L + 2)[None], letters()
    settings = {"max_new_tokens": 2 * L, "num_beams": beams, "tokenizer": tokenizer, **GREEDY}
    said = model.generate(ids, **settings)[0, L + 2 :].tolist()
    if beams == 1:
        stop = tokenizer.decode(said[3:5])
        first = next(i for i in range(1, 2 * L) if tokenizer.decode(said[i - 1 : i + 1]) == stop)
        assert model.generate(ids, stop_strings=[stop], **settings)[0, L + 2 :].tolist() == said[: first + 1]
    else:
        assert said == model.generate(ids, max_new_tokens=2 * L, num_beams=beams, **GREEDY)[0, L + 2 :].tolist()


@pytest.mark.parametrize("side", ["config", "model", "saved"])
def test_the_number_of_passes_may_stand_in_the_generation_config(side, tmp_path):
    model = make_model("llama", sleep_config("llama", window_size=L), torch.double)
    ids, settings = tokens(3 * L)[None], {"max_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True}
    one, four = (model.generate(ids, sleep_passes=n, **settings, **GREEDY).logits[0] for n in (1, 4))
    assert not torch.allclose(one, four)
    with_four, arguments = GenerationConfig(sleep_passes=4, **settings, **GREEDY), {**settings, **GREEDY}
    if side == "config":
        arguments = {"generation_config": with_four}
    else:
        model.generation_config.sleep_passes = 4
        if side == "saved":
            model.save_pretrained(tmp_path)
            model = SleepForCausalLM.from_pretrained(tmp_path, dtype=torch.double)
            # Its decay gates are rounded to fp32 by loading.
            one, four = (model.generate(ids, sleep_passes=n, **settings, **GREEDY).logits[0] for n in (1, 4))
    assert torch.equal(model.generate(ids, **arguments).logits[0], four)
    assert torch.equal(model.generate(ids, sleep_passes=1, **arguments).logits[0], one)
    # A forward is not generation.
    assert torch.equal(model(ids, logits_to_keep=1).logits, model(ids, logits_to_keep=1, sleep_passes=2).logits)


@pytest.mark.parametrize("passes", [0, "4", True])
def test_an_impossible_number_of_passes_is_refused_wherever_it_stands(passes):
    model = sleeper("llama", "hard")
    with pytest.raises(ValueError, match=f"sleep_passes={passes!r}: it must be an integer of at least 1"):
        model.generate(tokens(3)[None], generation_config=GenerationConfig(sleep_passes=passes, max_new_tokens=1))


@pytest.mark.parametrize("how", ["passed", "returned", "dropped"])
def test_a_stop_that_is_noticed_late_never_reaches_the_users_cache(how):
    """generate on MPS looks a step late whether it should stop, and crops the token too many from the cache."""
    model, ids = sleeper("llama", "hard"), tokens(L + 2)[None]
    said = model.generate(ids, max_new_tokens=2 * L, **GREEDY)[0, L + 2 :].tolist()
    end = next(token for i, token in enumerate(said) if i and token not in said[:i])
    length = L + 2 + said.index(end) + 1
    cache = SleepCache() if how == "passed" else None
    asked, is_supported = [], DeferredStopCheck.is_supported

    def on_mps(device, *args, **kwargs):
        asked.append(is_supported(torch.device("mps"), *args, **kwargs))
        return asked[-1]

    with (
        mock.patch.object(DeferredStopCheck, "is_supported", staticmethod(on_mps)),
        mock.patch.object(torch, "Event"),  # which the CPU has none of, and needs none of
    ):
        settings = {"eos_token_id": end, "return_dict_in_generate": how == "returned", **GREEDY}
        out = model.generate(ids, max_new_tokens=2 * L, cache=cache, **settings)
    # Where nobody sees the cache it may be late, and is.
    assert asked == [how == "dropped"]
    sequences = out.sequences if how == "returned" else out
    assert sequences[0].tolist() == ids[0].tolist() + said[: said.index(end) + 1]
    cache = out.cache if how == "returned" else cache
    if cache is not None:
        assert cache.memory.columns == cache.memory.counters[0].seen == length - 1
        expected = read(model, sequences, None)[:, -1:]
        assert torch.allclose(read(model, sequences[:, -1:], cache), expected, atol=1e-8)


def test_the_cache_answers_to_both_names():
    model, ids = sleeper("llama", "hard"), tokens(L + 2)[None]
    settings = {"max_new_tokens": 2, "return_dict_in_generate": True, **GREEDY}
    calls = {
        "forward": lambda **cache: model(ids, **cache).cache,
        "generate": lambda **cache: model.generate(ids, **cache, **settings).cache,
        "sleep": lambda **cache: model.sleep(**cache),
    }
    for name, call in calls.items():
        cache, spare = SleepCache(), SleepCache()
        if name == "sleep":
            read(model, ids, cache)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert call(past_key_values=cache) is cache
        # transformers passes it by the old name itself before 5.24, so there nothing warns.
        assert {warning.category for warning in caught} == ({FutureWarning} if CACHE == "cache" else set())
        with pytest.raises((ValueError, FutureWarning), match=r"not as both|Both `past_key_values` and `cache`"):
            call(past_key_values=spare, cache=cache)
        assert spare.is_empty
    for out in (model(ids), model.generate(ids, **settings)):
        assert out.cache is out["cache"] is out.get("cache") is out.past_key_values is out["past_key_values"]
        assert "cache" in out
        assert "past_key_values" in out


# What a token costs.


@contextmanager
def counting():
    """Calls per layer: `layer i` of the base and `block i`, the injected one after it."""
    calls: Counter = Counter()

    def counted(function, name):
        def call(self, *args, **kwargs):
            calls[name(self, *args)] += 1
            return function(self, *args, **kwargs)

        return call

    with (
        mock.patch.object(Decoder, "attention_layer", counted(Decoder.attention_layer, lambda _, i, *__: f"layer {i}")),
        mock.patch.object(Decoder, "recurrent_layer", counted(Decoder.recurrent_layer, lambda _, i, *__: f"layer {i}")),
        mock.patch.object(FastWeightBlock, "forward", counted(FastWeightBlock.forward, lambda *_: "blocks")),
    ):
        yield calls


def unwanted_layers(model) -> range:
    """Layers that the last pass of a sleep leaves out: after the last fast weights, where all KV is dropped."""
    sleep, decoder = model.config.sleep, model.decoder
    own = [i for i, kind in enumerate(decoder.kinds) if kind in decoder.recurrent_kinds]
    return range(1 + max(*sleep.block_layers, *own, -1), 4) if sleep.eviction == "hard" else range(0)


LOOPS = [None, (0, 2), (1, 3), (2, 4), (1, 2)]


@pytest.mark.parametrize(("family", "eviction"), [("llama", "hard"), ("qwen3_next", "sliding")])
@pytest.mark.parametrize("passes", [1, 2, 4])
@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_a_window_that_was_read_sleeps_in_one_pass_less(family, eviction, passes, loop):
    """The ordinary read was pass 1; layers after the loop read the window once more, on what the last pass made.

    After the last block, nobody wants what the last pass makes of a window that is evicted hard.
    """
    model = sleeper(family, eviction, sleep_passes=passes, loop_layers=loop)
    a, b = model.config.sleep.loop_layers
    cache = SleepCache()
    for t in range(L):
        read(model, tokens(L)[None, t : t + 1], cache)
    blocks = {int(i) for i in model.fast_weights}
    expected = Counter({f"layer {i}": passes - 1 for i in range(a, b)})
    expected += Counter({f"layer {i}": 1 for i in range(b, 4) if passes > 1})
    unwanted = unwanted_layers(model) if passes > 1 else ()
    expected -= Counter({f"layer {i}": 1 for i in unwanted})
    expected["blocks"] = sum((passes - 1 if a <= i < b else int(i >= b and passes > 1)) for i in blocks)
    with counting() as calls:
        model.sleep(cache)
    assert calls == +expected
    layers = sum(n for name, n in calls.items() if name != "blocks")
    assert layers == (passes - 1) * (b - a) + (4 - b) * (passes > 1) - len(unwanted)
    assert cache.memory.counters[0].sleeps == 1


@every_case
def test_a_decoded_token_costs_one_pass_whatever_was_read(family, eviction):
    """And the token that opens a window, the sleep before it."""
    model, cache, ids = sleeper(family, eviction, sleep_passes=3), SleepCache(), tokens(6 * L + 1)[None]
    for t in range(6 * L + 1):
        with counting() as calls:
            read(model, ids[:, t : t + 1], cache)
        passes = 3 if t and t % L == 0 else 1
        unwanted = unwanted_layers(model) if passes > 1 else ()
        expected = {f"layer {i}": passes - (i in unwanted) for i in range(4)}
        assert calls == {**expected, "blocks": passes * len(model.fast_weights)}


@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_a_prompt_costs_n_passes_per_full_window_and_one_for_the_rest(loop):
    """Layers after the loop read a window that sleeps in the same call once, unless its logits are wanted.

    That after the last block, layer 3, is left out of the last pass.
    """
    model = sleeper("llama", "hard", sleep_passes=3, loop_layers=loop)
    a, b = model.config.sleep.loop_layers
    with counting() as calls:
        read(model, tokens(3 * L + 2)[None], SleepCache(), logits_to_keep=1)
    per_window = {i: 3 if a <= i < b else 1 for i in range(4)}
    per_window[3] -= 1
    assert {i: calls[f"layer {i}"] for i in range(4)} == {i: 3 * n + 1 for i, n in per_window.items()}


def test_prompts_padded_on_the_right_are_refused():
    model = make_model("llama", sleep_config("llama", window_size=4))
    ids, mask = tokens(6)[None], torch.tensor([[1, 1, 1, 1, 1, 0]])
    with pytest.raises(ValueError, match="pad prompts on the left"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral_window"])
def test_eager_attention_is_the_same_as_sdpa(family, eviction):
    model = make_model(family, sleep_config(family, window_size=5, eviction=eviction, num_sink_tokens=1))
    ids, mask = tokens(34).view(2, 17), torch.ones(2, 17, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.lm.set_attn_implementation("eager")
        cache = SleepCache()
        parts = [
            model(ids[:, a : a + 3], attention_mask=mask[:, a : a + 3], cache=cache).logits for a in range(0, 17, 3)
        ]
    assert (torch.cat(parts, 1) - expected).abs().max() < 1e-3 * expected.abs().max()
