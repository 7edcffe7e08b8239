"""SleepState: a conversation put away in its middle goes on token for token, and only with the model that had it."""

import dataclasses
import json

import pytest
import torch
from families import VOCAB, make_base, make_model, randomize, sleep_config, tokens
from safetensors.torch import save_file
from test_laws import pad

from hf_sleep import AutoModelForSleepLM, SleepCache, SleepForCausalLM, SleepState
from hf_sleep.state import fingerprint

L = 5
GREEDY = {"do_sample": False, "pad_token_id": 0}
CASES = [(family, eviction) for family in ("llama", "gemma3", "qwen3_next") for eviction in ("hard", "sliding")]
every_case = pytest.mark.parametrize(("family", "eviction"), CASES)


def sleeper(family="llama", eviction="hard", dtype=torch.float32, seed=0, **fields) -> SleepForCausalLM:
    defaults = {"window_size": L, "eviction": eviction, "num_sink_tokens": int(eviction == "sliding")}
    return make_model(family, sleep_config(family, **(defaults | fields)), dtype, seed=seed)


def put_away(model: SleepForCausalLM, cache: SleepCache, folder) -> SleepState:
    SleepState.from_cache(model, cache).save(folder / "state.safetensors")
    return SleepState.load(folder / "state.safetensors")


def same_tensors(a: SleepCache, b: SleepCache) -> bool:
    mine, theirs = (SleepState.from_cache(c._owner(), c).tensors for c in (a, b))
    return mine.keys() == theirs.keys() and all(
        torch.equal(t, theirs[name]) and t.dtype == theirs[name].dtype for name, t in mine.items()
    )


@every_case
@pytest.mark.parametrize("loop", [None, (1, 3)], ids=str)
def test_a_ragged_batch_goes_on_bit_for_bit(family, eviction, loop, tmp_path):
    """One row in the middle of its third window, one before its first sleep, one with a full window, one silent."""
    model = sleeper(family, eviction, loop_layers=loop)
    ids, mask = pad([tokens(2 * L + 3, 1), tokens(2, 2), tokens(L, 3), tokens(0)], "left")
    cache = SleepCache()
    with torch.no_grad():
        model(ids, attention_mask=mask, cache=cache)
        state = put_away(model, cache, tmp_path)
        assert state.rows == cache.rows
        again = state.to_cache(model)
        assert again.get_seq_length() == cache.get_seq_length() == 2 * L + 3
        assert again.fast_slots == cache.fast_slots
        assert same_tensors(again, cache)
        more, mask = pad([tokens(L + 2, 4), tokens(1, 5), tokens(2 * L, 6), tokens(3, 7)], "left")
        for size in (more.shape[1], 1, 1):
            part = {"input_ids": more[:, -size:], "attention_mask": mask[:, -size:]}
            assert torch.equal(model(**part, cache=again).logits, model(**part, cache=cache).logits)
        assert again.rows == cache.rows
        assert same_tensors(again, cache)
        # The value is untouched by what was made of it.
        assert state.to_cache(model).get_seq_length() == 2 * L + 3


@every_case
def test_a_conversation_goes_on_token_for_token(family, eviction, tmp_path):
    """Into another copy of the model, read from its checkpoint."""
    model = sleeper(family, eviction)
    model.save_pretrained(tmp_path)
    ids, mask = pad([tokens(L + 3, 1), tokens(2, 2)], "left")
    settings = {"max_new_tokens": L + 2, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    first = model.generate(ids, attention_mask=mask, **settings)
    state = put_away(model, first.cache, tmp_path)
    assert [row.fill > 0 for row in state.rows] == [True, True]
    answer = torch.stack((tokens(3, 3), tokens(3, 4)))
    ids = torch.cat((first.sequences, answer), 1)
    mask = torch.cat((mask, torch.ones(2, L + 5, dtype=torch.long)), 1)
    expected = model.generate(ids, attention_mask=mask, cache=first.cache, **settings)

    other = SleepForCausalLM.from_pretrained(tmp_path)
    other.set_experts_implementation("eager")
    for parameter in other.parameters():
        # Mapped from the file they may lie unaligned, and then a matmul takes another kernel.
        parameter.data = parameter.data.clone()
    out = other.generate(ids, attention_mask=mask, cache=state.to_cache(other), **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, expected.logits, strict=True))
    assert out.cache.rows == expected.cache.rows
    whole = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(whole.sequences, expected.sequences)


@every_case
def test_after_a_sleep_only_what_the_eviction_keeps_is_held(family, eviction, tmp_path):
    model, cache = sleeper(family, eviction), SleepCache()
    with torch.no_grad():
        model(tokens(2 * L + 3)[None], cache=cache)
        middle = SleepState.from_cache(model, cache)
        model.sleep(cache)
    state, fast_slots = put_away(model, cache, tmp_path), cache.fast_slots
    layers = {name for name in state.tensors if name.startswith("layers")}
    kv = {name for name in layers if int(name.split(".")[1]) not in fast_slots}
    assert "hidden" in middle.tensors
    assert "hidden" not in state.tensors
    assert len(layers - kv) == 2 * len(fast_slots)
    assert bool(kv) is (eviction == "sliding")
    assert all(state.tensors[name].shape[-2] == L for name in kv)  # L - 1 recent tokens and the sink
    assert state.num_bytes() < middle.num_bytes()
    assert state.num_bytes() == sum(t.nbytes for t in state.tensors.values()) == cache.num_bytes()
    with torch.no_grad():
        more = tokens(L + 2, 8)[None]
        again = state.to_cache(model)
        assert torch.equal(model(more, cache=again).logits, model(more, cache=cache).logits)


def test_the_size_does_not_grow_with_what_was_read(tmp_path):
    model, sizes = sleeper(), []
    for windows in (2, 20):
        cache = SleepCache()
        with torch.no_grad():
            model(tokens(windows * L)[None], cache=cache)
            model.sleep(cache)
        put_away(model, cache, tmp_path)
        sizes.append(SleepState.from_cache(model, cache).num_bytes())
    assert sizes[0] == sizes[1]


# What is refused.


@pytest.fixture
def kept(tmp_path):
    """A model, and the state of a conversation with it."""
    model = sleeper()
    with torch.no_grad():
        cache = model(tokens(L + 2)[None], use_cache=True).cache
    return model, put_away(model, cache, tmp_path)


OTHERS = {
    "weights": ({"seed": 3}, "saved by another model .*fingerprint .* other weights"),
    "window_size": ({"window_size": L + 1}, "saved with window_size=5, this model has window_size=6: set it to that"),
    "eviction": ({"eviction": "sliding", "num_sink_tokens": 0}, "saved with eviction='hard', this model has"),
    "num_sink_tokens": ({"num_sink_tokens": 1}, "saved with num_sink_tokens=0, this model has num_sink_tokens=1"),
    "loop_layers": ({"loop_layers": (1, 3)}, r"saved with loop_layers=\[0, 4\], this model has loop_layers=\[1, 3\]"),
    "block_layers": (
        {"block_layers": (0, 3)},
        r"saved with block_layers=\[0, 2\], this model has block_layers=\[0, 3\]",
    ),
    "dtype": ({"dtype": torch.double}, r"of a torch\.float32 model, this one is torch\.float64: load it in that dtype"),
    "family": ({"family": "qwen2"}, "saved by another model"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_model_is_refused(case, kept):
    _, state = kept
    settings, message = OTHERS[case]
    with pytest.raises(ValueError, match=message):
        state.to_cache(sleeper(**settings))


def test_the_number_of_passes_may_change(kept):
    model, state = kept
    other = sleeper(sleep_passes=4)
    more = tokens(L + 2, 8)[None]
    with torch.no_grad():
        expected = model(more, cache=state.to_cache(model), sleep_passes=4).logits
        assert torch.equal(other(more, cache=state.to_cache(other)).logits, expected)


def test_a_cache_that_is_empty_or_of_another_model_has_no_state():
    model = sleeper()
    with pytest.raises(ValueError, match="the cache is empty: there is nothing to keep"):
        SleepState.from_cache(model, SleepCache())
    cache = model(tokens(L)[None], use_cache=True).cache
    with pytest.raises(ValueError, match="written by another model: pass the model that filled it"):
        SleepState.from_cache(sleeper(), cache)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "hf_sleep.state.v0"}])
def test_a_file_that_is_no_state_is_named(metadata, tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors", metadata=metadata)
    found = repr((metadata or {}).get("format"))
    with pytest.raises(ValueError, match=rf"other\.safetensors is no sleep state: its format is {found}"):
        SleepState.load(tmp_path / "other.safetensors")


def test_a_file_that_is_no_safetensors_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("not a state", encoding="utf-8")
    with pytest.raises(ValueError, match=r"notes\.txt is no sleep state"):
        SleepState.load(tmp_path / "notes.txt")


def test_a_model_checkpoint_is_no_state(tmp_path):
    sleeper().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no sleep state: its format is 'pt'"):
        SleepState.load(tmp_path / "model.safetensors")


def test_a_state_is_a_value(kept):
    """It survives a copy, and its header is plain JSON."""
    model, state = kept
    copy = dataclasses.replace(state, tensors={name: t.clone() for name, t in state.tensors.items()})
    assert json.loads(json.dumps(copy.settings)) == state.settings
    more = tokens(L, 8)[None]
    with torch.no_grad():
        expected = model(more, cache=state.to_cache(model)).logits
        assert torch.equal(model(more, cache=copy.to_cache(model)).logits, expected)
        for t in copy.tensors.values():
            t.zero_()
        assert not torch.equal(model(more, cache=copy.to_cache(model)).logits, expected)


# The fingerprint.


def round_to_bfloat16(model: SleepForCausalLM) -> SleepForCausalLM:
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_next"])
def test_the_fingerprint_is_of_the_weights_alone(family, tmp_path):
    model = round_to_bfloat16(sleeper(family))
    mine = fingerprint(model)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert fingerprint(SleepForCausalLM.from_pretrained(tmp_path)) == mine
    assert fingerprint(SleepForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")) == mine
    assert fingerprint(sleeper(family, "sliding", window_size=9, sleep_passes=1)) == mine
    assert fingerprint(sleeper(family, seed=3)) != mine
    assert fingerprint(model.double()) == mine
    assert fingerprint(model.bfloat16()) == mine


@pytest.mark.parametrize(
    ("part", "rate"), [("everything", 1e-5), ("fast_weights", 1e-4), ("lm", 1e-5), ("A_log", 1e-2)]
)
def test_the_fingerprint_changes_with_one_training_step(part, rate):
    model = sleeper().train()
    before = fingerprint(model)
    parameters = [p for name, p in model.named_parameters() if part in ("everything", *name.split("."))]
    ids = tokens(2 * L + 3)[None]
    model(ids, labels=ids).loss.backward()
    torch.optim.AdamW(parameters, lr=rate).step()
    assert fingerprint(model) != before


def test_the_fingerprint_changes_with_shape_and_name():
    model = sleeper()
    before = fingerprint(model)
    assert fingerprint(sleeper(block_layers=(0, 1))) != before
    model.resize_token_embeddings(VOCAB + 1, mean_resizing=False)
    assert fingerprint(model) != before


def test_the_fingerprint_does_not_depend_on_where_the_weights_are(tmp_path):
    """A state written by a model that fits its device must serve the same model where it is offloaded."""
    make_base("llama").save_pretrained(tmp_path)
    sleep = sleep_config("llama", window_size=L)
    model = AutoModelForSleepLM.from_pretrained(tmp_path, sleep=sleep)
    where = {"model": "disk", "lm_head": "cpu"}
    spread = AutoModelForSleepLM.from_pretrained(
        tmp_path, sleep=sleep, device_map=where, offload_folder=tmp_path / "offload"
    )
    randomize(model.fast_weights, 1)
    randomize(spread.fast_weights, 1)
    assert fingerprint(spread) == fingerprint(model)
