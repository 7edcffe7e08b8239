"""Stock `generate` on a model that sleeps as it goes, and what of `generate` cannot work with memory."""

import copy
import functools
from collections import Counter
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from families import make_base, make_model, sleep_config, tokens
from test_laws import pad
from transformers import DynamicCache, StoppingCriteriaList
from transformers.generation import BaseStreamer

from hf_sleep import SleepCache, SleepForCausalLM
from hf_sleep.decoders import Decoder, HybridDecoder
from hf_sleep.layers import FastWeightBlock

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
    """In float64, so that two ways to the same logits choose the same token. Shared: nothing may change it."""
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
    settings = {"max_new_tokens": L + 2, "prefill_chunk_size": chunk, **GREEDY}
    said = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **settings)
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
        assert {row.seen for row in cache.rows} == {cache.get_seq_length()}
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
    rows = out.cache.rows
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
    "assistant": (lambda: {"assistant_model": make_base("llama")}, "not supported with stateful models, such as Sleep"),
    "static": (lambda: {"cache_implementation": "static"}, "cache_implementation='static' cannot hold fast weights"),
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
    assert [row.seen for row in cache.rows] == [2 * L + 3] * 3 + [2] * 3
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
        assert [(row.seen, row.sleeps) for row in other.rows] == [(2 * L + 3, 2), (2, 0)]
    # A fork shares tensors, which nobody writes in place; a deep copy does not.
    cache.tensors.map(lambda t: t.fill_(7))
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


# What a token costs.


@contextmanager
def counting():
    """Calls per layer: `layer i` of the base and `block i`, the injected one behind it."""
    calls: Counter = Counter()

    def counted(function, name):
        def call(self, *args, **kwargs):
            calls[name(self, *args)] += 1
            return function(self, *args, **kwargs)

        return call

    with (
        mock.patch.object(Decoder, "attention_layer", counted(Decoder.attention_layer, lambda _, i, *__: f"layer {i}")),
        mock.patch.object(
            HybridDecoder, "linear_layer", counted(HybridDecoder.linear_layer, lambda _, i, *__: f"layer {i}")
        ),
        mock.patch.object(FastWeightBlock, "forward", counted(FastWeightBlock.forward, lambda *_: "blocks")),
    ):
        yield calls


LOOPS = [None, (0, 2), (1, 3), (2, 4), (1, 2)]


@pytest.mark.parametrize(("family", "eviction"), [("llama", "hard"), ("qwen3_next", "sliding")])
@pytest.mark.parametrize("passes", [1, 2, 4])
@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_a_window_that_was_read_sleeps_in_one_pass_less(family, eviction, passes, loop):
    """The ordinary read was pass 1; layers behind the loop read the window once more, on what the last pass made."""
    model = sleeper(family, eviction, sleep_passes=passes, loop_layers=loop)
    a, b = loop or (0, 4)
    cache = SleepCache()
    for t in range(L):
        read(model, tokens(L)[None, t : t + 1], cache)
    blocks = {int(i) for i in model.fast_weights}
    expected = Counter({f"layer {i}": passes - 1 for i in range(a, b)})
    expected += Counter({f"layer {i}": 1 for i in range(b, 4) if passes > 1})
    expected["blocks"] = sum((passes - 1 if a <= i < b else int(i >= b and passes > 1)) for i in blocks)
    with counting() as calls:
        model.sleep(cache)
    assert calls == +expected
    assert sum(n for name, n in calls.items() if name != "blocks") == ((passes - 1) * (b - a) + (4 - b) * (passes > 1))
    assert cache.rows[0].sleeps == 1


@every_case
def test_a_decoded_token_costs_one_pass_whatever_was_read(family, eviction):
    """And the token that opens a window, the sleep before it."""
    model, cache, ids = sleeper(family, eviction, sleep_passes=3), SleepCache(), tokens(6 * L + 1)[None]
    for t in range(6 * L + 1):
        with counting() as calls:
            read(model, ids[:, t : t + 1], cache)
        passes = 3 if t and t % L == 0 else 1
        assert calls == {**{f"layer {i}": passes for i in range(4)}, "blocks": passes * len(model.fast_weights)}


@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_a_prompt_costs_n_passes_per_full_window_and_one_for_the_rest(loop):
    """Layers behind the loop read a window that sleeps in the same call once, unless its logits are wanted."""
    model = sleeper("llama", "hard", sleep_passes=3, loop_layers=loop)
    a, b = loop or (0, 4)
    with counting() as calls:
        read(model, tokens(3 * L + 2)[None], SleepCache(), logits_to_keep=1)
    assert {i: calls[f"layer {i}"] for i in range(4)} == {i: 3 * 3 + 1 if a <= i < b else 3 + 1 for i in range(4)}


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
