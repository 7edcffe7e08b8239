"""How people call `generate`: a cache that outlives a call, settings of a model's own, masks that nobody gave."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from families import make_model, sleep_config, tokens
from helpers import pad, word_tokenizer, words
from test_generation import GREEDY, L, sleeper
from transformers import GenerationConfig
from transformers.generation import (
    BaseStreamer,
    LogitsProcessorList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from hf_sleep import SleepCache, SleepForCausalLM, SleepSession, StaticSleepCache, UntilSettled
from hf_sleep.compat import GenerationMixin

PROMPT = tokens(L + 2)[None]


def asked(model, ids, cache=None, **settings):
    """Greedy, with scores."""
    given = {} if cache is None else {"cache": cache}
    how = {"max_new_tokens": L + 1, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **given, **(how | settings))


def same_answer(one, other):
    return torch.equal(one.sequences, other.sequences) and all(map(torch.allclose, one.logits, other.logits))


@pytest.fixture(params=["hard", "sliding"])
def model(request):
    return sleeper("llama", request.param).eval()


# A cache that outlives the call.


class Interrupts(BaseStreamer):
    """Raises at its fifth token, as Ctrl-C does."""

    def __init__(self):
        self.heard = 0

    def put(self, value):
        self.heard += 1
        if self.heard > 5:
            raise KeyboardInterrupt

    def end(self):
        raise AssertionError


@pytest.mark.parametrize("kind", [SleepCache, StaticSleepCache])
@pytest.mark.parametrize("with_past", [False, True])
def test_an_interrupted_answer_leaves_the_cache_as_it_was(model, kind, with_past):
    cache, ids = kind(), PROMPT
    if with_past:
        ids = asked(model, PROMPT, cache).sequences
    before, columns = cache.fork(), cache.get_seq_length()
    ids, how = torch.cat((ids, tokens(3, 7)[None]), 1), {"max_new_tokens": 9, **GREEDY}
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, attention_mask=torch.ones_like(ids), cache=cache, streamer=Interrupts(), **how)
    assert cache.get_seq_length() == columns
    # The next turn: what the interrupted one said is not in it.
    following = torch.cat((ids, tokens(2 * L, 8)[None]), 1)
    expected = asked(model, following, before if with_past else None)
    assert same_answer(asked(model, following, cache), expected)


def test_an_error_between_two_chunks_of_a_prompt_takes_back_the_first(model):
    cache, wrong = SleepCache(), tokens(2 * L)[None].clone()
    wrong[0, -1] = 999
    with pytest.raises(ValueError, match="input_ids hold 999"):
        asked(model, wrong, cache, prefill_chunk_size=3)
    assert cache.is_empty


def test_a_beam_search_leaves_the_cache_as_it_was(model):
    """What its beams have read last are not the sequences that it returns."""
    cache = SleepCache()
    first = asked(model, PROMPT, cache, num_beams=2)
    assert cache.is_empty
    assert asked(model, PROMPT, num_beams=2).cache.is_empty
    following = torch.cat((first.sequences, tokens(3, 7)[None]), 1)
    second = asked(model, following, cache)
    assert same_answer(second, asked(model, following))
    held, longer = cache.get_seq_length(), torch.cat((second.sequences, tokens(L, 8)[None]), 1)
    cache.batch_repeat_interleave(2)
    beams = asked(model, longer, cache, num_beams=2)
    assert cache.get_seq_length() == held
    assert torch.equal(beams.sequences, asked(model, longer, num_beams=2).sequences)


def test_rows_that_are_not_the_cache_s_are_counted_first(model):
    cache, (ids, mask) = SleepCache(), pad([tokens(L + 2, 1), tokens(3, 2)], "left")
    model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=3, **GREEDY)
    with pytest.raises(ValueError, match="cache holds 2 sequences, the input 1"):
        asked(model, tokens(3 * L)[None], cache)


# Settings that stand in the model's own generation config, as a base's files may have them.


@contextmanager
def usually(model, **fields):
    with mock.patch.object(model, "generation_config", GenerationConfig(**fields)):
        yield


@pytest.mark.parametrize("fields", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_a_cache_that_is_given_wins_over_the_model_s_own_config(model, fields):
    expected = asked(model, PROMPT)
    session = SleepSession(model, word_tokenizer(), chat=False)
    session.read(words(L + 1), progress=False)
    answer = session.ask(words(2), max_new_tokens=L, do_sample=False)
    with usually(model, **fields):
        assert same_answer(asked(model, PROMPT, SleepCache()), expected)
        assert session.ask(words(2), max_new_tokens=L, do_sample=False) == answer
    for name, value in fields.items():
        with pytest.raises(ValueError, match=f"{name}={value!r} and a .*contradict each other"):
            asked(model, PROMPT, SleepCache(), **{name: value})


def test_use_cache_none_is_none_given(model):
    assert same_answer(asked(model, PROMPT, use_cache=None), asked(model, PROMPT))


def test_a_policy_is_kept_in_a_generation_config_s_file(tmp_path):
    for passes in (3, UntilSettled(cap=3)):
        GenerationConfig(sleep_passes=passes).save_pretrained(tmp_path)
        saved = GenerationConfig.from_pretrained(tmp_path)
        told = []
        model = sleeper("llama", "hard").eval()
        with model.on_sleep(lambda event: told.append(event.sleep_passes)):  # noqa: B023
            model.generate(PROMPT, generation_config=saved, max_new_tokens=1, **GREEDY)
        assert told
        assert all(n <= 3 for n in told)
        assert set(told) != {2}


# Where generate calls the model besides.


def test_guidance_sleeps_with_the_passes_of_the_call(model):
    told = []
    with model.on_sleep(lambda event: told.append(event.sleep_passes)):
        ids = tokens(3 * L)[None]
        settings = {"negative_prompt_ids": ids.flip(1), "guidance_scale": 2.0, "max_new_tokens": 2, **GREEDY}
        model.generate(ids, attention_mask=torch.ones_like(ids), sleep_passes=4, **settings)
    assert told == [4] * 6


def test_a_guide_of_the_caller_s_stays_as_it_is(model):
    class Other(torch.nn.Module):
        def forward(self, input_ids, attention_mask, use_cache, **cache):
            assert not cache.keys() - {"cache", "past_key_values"}
            return guide.generate_output(input_ids)

    class Guide:
        def generate_output(self, input_ids):
            return model(input_ids.repeat(1, 2))

    guide, other = Guide(), Other()
    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, other, PROMPT, use_cache=False)
    asked(model, PROMPT, sleep_passes=3, logits_processor=LogitsProcessorList([processor]), max_new_tokens=2)
    assert processor.model is other


def test_an_empty_prompt_is_named(model):
    with pytest.raises(ValueError, match=r"the input has shape \(1, 0\)"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=2, **GREEDY)


def test_a_config_with_a_policy_of_one_s_own_can_be_looked_at():
    class Mine(UntilSettled):
        pass

    config = GenerationConfig(sleep_passes=Mine(cap=2))
    assert "UntilSettled" in repr(config) or "Mine" in repr(config)
    assert config != GenerationConfig(sleep_passes=3)


def test_a_sleep_while_decoding_runs_experts_as_outside_of_it():
    """transformers decodes with `batched_mm` off the CPU, which copies an expert's weights for every token."""
    model = make_model("mixtral", sleep_config("mixtral", window_size=L)).eval()
    model.set_experts_implementation("grouped_mm")
    ran, original = [], GenerationMixin._optimize_model_for_decode

    def elsewhere(self):
        @contextmanager
        def switched():
            context = original(self)
            with mock.patch.object(SleepForCausalLM, "device", torch.device("cuda")):
                context.__enter__()
            yield
            context.__exit__(None, None, None)

        return switched()

    def note(layer, args, kwargs):
        ran.append((args[0].shape[1], model.lm.config._experts_implementation))

    watched = model.lm.model.layers[1].register_forward_pre_hook(note, with_kwargs=True)
    with mock.patch.object(GenerationMixin, "_optimize_model_for_decode", elsewhere):
        said = model.generate(tokens(L - 1)[None], max_new_tokens=L, min_new_tokens=L, **GREEDY)
    watched.remove()
    assert {(1, "batched_mm"), (L, "grouped_mm")} <= set(ran)
    assert not any(how == "batched_mm" for width, how in ran if width > 1)
    assert model.lm.config._experts_implementation == "grouped_mm"
    assert torch.equal(said, model.generate(tokens(L - 1)[None], max_new_tokens=L, min_new_tokens=L, **GREEDY))


def test_embeddings_after_a_cache_are_not_read_in_chunks(model):
    ids = tokens(3 * L + 2)[None]
    embeds, settings = model.get_input_embeddings()(ids).detach(), {"max_new_tokens": 4, **GREEDY}
    said = []
    for chunk in (None, 3):
        cache = SleepCache()
        model(ids[:, : 2 * L + 3], cache=cache)
        said.append(model.generate(inputs_embeds=embeds, cache=cache, prefill_chunk_size=chunk, **settings))
        assert cache.get_seq_length() == ids.shape[1] + 3
    assert torch.equal(*said)
    rows, mask = pad([tokens(L + 2, 1), tokens(3, 2)], "left")
    how = {"attention_mask": mask, **settings}
    padded = model.generate(inputs_embeds=model.get_input_embeddings()(rows).detach(), prefill_chunk_size=3, **how)
    assert torch.equal(padded, model.generate(rows, **how)[:, rows.shape[1] :])


# Input that cannot be meant.


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([5, 0, 6, 7], "row 1 of the input has it after its first token"),
        ([5, 6, 7, 0], "row 1 of the input has it after its first token"),
        ([0, 0, 0, 0], "row 1 of the input has it and nothing else"),
    ],
)
def test_a_mask_that_was_inferred_is_explained(model, row, message):
    ids, settings = torch.tensor([[0, 5, 6, 7], row]), {"max_new_tokens": 2, "eos_token_id": 3, **GREEDY}
    with pytest.raises(ValueError, match=rf"without an attention_mask generate takes token 0.*{message}"):
        model.generate(ids, **settings)
    text = torch.tensor([[5, 0, 6, 7]])
    assert model.generate(text, attention_mask=torch.ones_like(text), **settings).shape[1] > 4
    good = torch.tensor([[0, 5, 6, 7], [4, 5, 6, 7]])
    assert torch.equal(model.generate(good, **settings)[1, :5], model.generate(good[1:], **settings)[0, :5])


def test_what_is_no_cache_and_no_tensor_is_named(model):
    with pytest.raises(ValueError, match="cache is a tuple: a sleeping model needs"):
        asked(model, PROMPT, ())
    for call in (asked, lambda model, ids, **marks: model(ids, **marks)):
        with pytest.raises(ValueError, match="sleep_after is a list: it must be a tensor"):
            call(model, PROMPT, sleep_after=[[0] * PROMPT.shape[1]])


def test_a_processor_that_fails_leaves_the_cache_as_it_was(model):
    def fails(ids, scores):
        raise RuntimeError("mine")

    cache = SleepCache()
    with pytest.raises(RuntimeError, match="mine"):
        asked(model, PROMPT, cache, logits_processor=LogitsProcessorList([fails]))
    assert cache.is_empty
