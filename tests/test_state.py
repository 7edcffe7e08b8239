"""SleepState: a conversation put away in its middle continues token for token, and only with the model that had it."""

import dataclasses
import hashlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from families import FAMILIES, VOCAB, make_base, make_model, randomize, sleep_config, tokens
from helpers import pad
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hf_sleep.state
from hf_sleep import AutoModelForSleepLM, SleepCache, SleepForCausalLM, SleepState
from hf_sleep.memory import Counters
from hf_sleep.state import COUNTERS, fingerprint

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
        assert state.rows == list(cache.memory.counters)
        again = state.to_cache(model)
        assert again.get_seq_length() == cache.get_seq_length() == 2 * L + 3
        assert again.fast_slots == cache.fast_slots
        assert same_tensors(again, cache)
        more, mask = pad([tokens(L + 2, 4), tokens(1, 5), tokens(2 * L, 6), tokens(3, 7)], "left")
        for size in (more.shape[1], 1, 1):
            part = {"input_ids": more[:, -size:], "attention_mask": mask[:, -size:]}
            assert torch.equal(model(**part, cache=again).logits, model(**part, cache=cache).logits)
        assert again.memory.counters == cache.memory.counters
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
    assert out.cache.memory.counters == expected.cache.memory.counters
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whatever_a_model_carries_is_what_is_expected_of_it(family, dtype, tmp_path):
    """Before and after sleeps, of some rows and of all, with stale columns, with rows that are gone."""
    for eviction in ("hard", "sliding"):
        model = sleeper(family, eviction, dtype)
        ids, mask = pad([tokens(2 * L + 3, 1), tokens(2, 2), tokens(0)], "left")
        with torch.no_grad():
            cache = model(ids, attention_mask=mask, use_cache=True).cache
            for change in (
                lambda: None,
                lambda: model.sleep(cache),  # noqa: B023
                lambda: model(ids[:, -3:], attention_mask=mask[:, -3:], cache=cache),  # noqa: B023
                lambda: cache.select_rows(torch.tensor([1, 2])),  # noqa: B023
                lambda: model.sleep(cache),  # noqa: B023
            ):
                change()
                again = put_away(model, cache, tmp_path).to_cache(model)
                assert again.memory.counters == cache.memory.counters
                assert same_tensors(again, cache)


def test_a_state_read_under_autocast_goes_on_under_autocast(tmp_path):
    model = sleeper("qwen3_next")
    ids, mask = pad([tokens(2 * L + 3, 1), tokens(2, 2)], "left")
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            cache = model(ids, attention_mask=mask, use_cache=True).cache
            state = put_away(model, cache, tmp_path)
            more = torch.stack((tokens(L, 3), tokens(L, 4)))
            expected = model(more, cache=cache).logits
            assert torch.equal(model(more, cache=state.to_cache(model)).logits, expected)
        with pytest.raises(ValueError, match=r"bfloat16, where this model carries .* of torch\.float32"):
            state.to_cache(model)


def test_a_state_is_shown_in_one_line(kept):
    model, state = kept
    assert repr(state) == (
        f"SleepState(rows=1, tokens=[{L + 2}], sleeps=[1], bytes={state.num_bytes()}, window_size={L}, "
        f"eviction='hard', dtype=torch.float32, fingerprint={fingerprint(model)[:12]})"
    )
    many = dataclasses.replace(state, rows=state.rows * 100)
    assert f"rows=100, tokens=[{L + 2}, " in repr(many)
    assert len(repr(many)) < 250


# Damaged files.


def damaged(data: bytes, kind: str, rng: random.Random) -> bytes:
    """`data` with one thing changed."""
    header, out = 8 + int.from_bytes(data[:8], "little"), bytearray(data)
    at = rng.randrange(header) if rng.random() < 0.5 else rng.randrange(header, len(data))
    if kind == "bit":
        out[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        out[at] = rng.randrange(256)
    elif kind == "zeroed":
        size = rng.choice((1, 8, 64, 512))
        out[at : at + size] = bytes(len(out[at : at + size]))
    elif kind == "truncated":
        del out[at:]
    elif kind == "appended":
        out += rng.randbytes(rng.choice((1, 8, 4096)))
    elif kind == "inserted":
        out[at:at] = rng.choice((b" ", b"\0", b'"'))
    elif kind == "moved":
        other = rng.randrange(len(out) - 8)
        out[at : at + 8] = out[other : other + 8]
    return bytes(out)


KINDS = ("bit", "byte", "zeroed", "truncated", "appended", "inserted", "moved")


def test_a_thousand_damaged_files_are_refused(tmp_path):
    """Four states, in the middle of a window and after a sleep, of ragged rows: any change, however small."""
    path, rng, refused = tmp_path / "state.safetensors", random.Random(0), dict.fromkeys(KINDS, 0)
    for family, eviction, number in [(f, e, 125) for f in ("llama", "qwen3_next") for e in ("hard", "sliding")]:
        model, cache = sleeper(family, eviction), SleepCache()
        ids, mask = pad([tokens(2 * L + 3, 1), tokens(2, 2)], "left")
        for slept in (False, True):
            with torch.no_grad():
                model.sleep(cache) if slept else model(ids, attention_mask=mask, cache=cache)
            put_away(model, cache, tmp_path)
            data, done = path.read_bytes(), 0
            while done < number:
                kind = KINDS[done % len(KINDS)]
                if (bad := damaged(data, kind, rng)) == data:
                    continue
                done += 1
                path.write_bytes(bad)
                with pytest.raises(
                    ValueError, match=r"state\.safetensors (is damaged|is no sleep state|has the format)"
                ):
                    SleepState.load(path)
                refused[kind] += 1
            path.write_bytes(data)
            assert same_tensors(SleepState.load(path).to_cache(model), cache)
    assert sum(refused.values()) == 1000


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        SleepState.load(tmp_path / "state.safetensors")


def rewrite(folder: Path, **changes) -> Path:
    """The state's file with other metadata and with a right digest; `None` takes a field away."""
    path = folder / "state.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in (file.metadata() | changes).items() if value is not None}
    if "sha256" in metadata:
        metadata["sha256"] = hf_sleep.state.NO_DIGEST
    save_file(load_file(path), path, metadata=metadata)
    data = path.read_bytes()
    at = data.find(f'"{hf_sleep.state.NO_DIGEST}"'.encode()) + 1
    if at:
        path.write_bytes(data[:at] + hf_sleep.state._digest(data, at).encode() + data[at + 64 :])
    return path


def test_the_digest_is_of_the_file_with_zeros_in_its_place(kept, tmp_path):
    """Check it as a reader in another language would."""
    data = (tmp_path / "state.safetensors").read_bytes()
    digest = re.search(rb'"sha256":"([0-9a-f]{64})"', data)[1]
    assert hashlib.sha256(data.replace(digest, b"0" * 64)).hexdigest().encode() == digest
    SleepState.load(rewrite(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "hf_sleep.state.v4", "version": "9.9"}, "format 'hf_sleep.state.v4' of hf_sleep 9.9.*: upgrade"),
        ({"format": "hf_sleep.state.v1"}, "'hf_sleep.state.v1' has .*, this file .*'sha256'"),
        ({"note": "mine"}, "is damaged: .* this file .*'note'"),
        ({"state": None}, "is damaged"),
        ({"sha256": None}, "is damaged"),
        ({"state": "[]"}, "its header is a JSON list, not an object"),
        ({"state": "{"}, "its header is not JSON"),
        ({"state": "[" * 100_000}, "its header is not JSON"),
        ({"state": "{}"}, "its header is {}, it must have rows, columns, settings, fingerprint, dtype"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_header_that_cannot_be_is_refused(changes, message, kept, tmp_path):
    with pytest.raises(ValueError, match=message):
        SleepState.load(rewrite(tmp_path, **changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("more", 1),
        ("columns", "7"),
        ("columns", True),
        ("columns", L + 1),
        ("rows", {}),
        ("rows", []),
        ("rows", [7]),
        ("rows", [{"seen": 7}]),
        ("rows", [{"seen": 7, "fill": 2, "retained": 0, "position": 2, "sleeps": "1"}]),
        ("rows", [{"seen": "7", "fill": 2, "retained": 0, "position": 2, "sleeps": 1}]),
        ("rows", [{"seen": 7, "fill": None, "retained": 0, "position": 2, "sleeps": 1}]),
        ("rows", [{"seen": 7, "fill": 2.0, "retained": 0, "position": 2, "sleeps": 1}]),
        ("settings", []),
        ("settings", {"window_size": L}),
        ("window_size", [L]),
        ("window_size", -1),
        ("eviction", {"hard": 1}),
        ("fingerprint", None),
        ("dtype", 32),
    ],
    ids=str,
)
def test_a_field_that_cannot_be_is_refused(key, value, kept, tmp_path):
    _, state = kept
    header = {name: getattr(state, name) for name in ("columns", "settings", "fingerprint", "dtype")}
    header["rows"] = [dataclasses.asdict(row) for row in state.rows]
    assert SleepState.load(rewrite(tmp_path, state=json.dumps(header))).rows == state.rows
    if key in header["settings"]:
        header["settings"] = header["settings"] | {key: value}
    else:
        header[key] = value
    with pytest.raises(ValueError, match="is no sleep state: "):
        SleepState.load(rewrite(tmp_path, state=json.dumps(header)))


def without(*names):
    return lambda state: {"tensors": {k: t for k, t in state.tensors.items() if k not in names}}


def with_tensor(name, change):
    return lambda state: {"tensors": state.tensors | {name: change(state.tensors.get(name))}}


def with_row(**counters):
    return lambda state: {"rows": [dataclasses.replace(state.rows[0], **counters)]}


def with_value(value):
    def change(t):
        t = t.clone()
        t.view(-1)[3] = value
        return t

    return change


# Of a state with 7 tokens read, 2 of them in the window, slot 0 attention and slot 1 a block.
CANNOT_BE = {
    "not a number": (
        with_tensor("layers.1.0", with_value(torch.nan)),
        r"layers\.1\.0 holds values that are not finite",
    ),
    "infinite": (with_tensor("hidden", with_value(-torch.inf)), "hidden holds values that are not finite"),
    "whole numbers": (with_tensor("layers.0.0", torch.Tensor.long), r"layers\.0\.0 is .*int64: it must hold floating"),
    "eight bits": (
        with_tensor("layers.0.0", lambda t: t.to(torch.float8_e4m3fn)),
        r"layers\.0\.0 is .*float8_e4m3fn: it must hold",
    ),
    "another batch": (with_tensor("hidden", lambda t: t.repeat(2, 1, 1)), r"hidden is \[2, 2, 32\].* of 1 rows"),
    "fill": (with_row(fill=L + 1), "row 0 has .*fill=6.* cannot leave"),
    "fill below 0": (with_row(fill=-1), "row 0 has .*fill=-1.* cannot leave"),
    "retained": (with_row(retained=3), "row 0 has .*retained=3.* cannot leave"),
    "position": (with_row(position=7), "row 0 has .*position=7.* cannot leave"),
    "sleeps": (with_row(sleeps=0), "row 0 has .*sleeps=0.* cannot leave"),
    "more sleeps than tokens": (with_row(sleeps=6), "row 0 has .*sleeps=6.* cannot leave"),
    "seen": (with_row(seen=1), "row 0 has .*seen=1.* cannot leave"),
    "columns": (lambda _: {"columns": 6}, "columns=6 with 7 tokens in the longest row"),
    "no rows": (lambda _: {"rows": []}, "columns=7 with None tokens"),
    "settings": (lambda state: {"settings": {"window_size": L}}, "its settings are .* must be window_size, eviction"),
}
DOES_NOT_FIT = {
    "no memory": (without("layers.1.0"), r"the state lacks layers\.1\.0, which this model carries"),
    "no keys": (without("layers.0.0", "layers.2.1"), r"the state lacks layers\.0\.0, layers\.2\.1"),
    "no hidden": (without("hidden"), "the state lacks hidden"),
    "no start": (without("window_start.1.0", "window_start.1.1"), r"the state lacks window_start\.1\.0"),
    "another layer": (with_tensor("layers.9.0", lambda _: torch.zeros(1, 2, 3)), r"the state has layers\.9\.0, which"),
    "a name": (
        with_tensor("memory", lambda _: torch.zeros(1, 2, 3)),
        "the state has memory, which this model does not",
    ),
    "a head less": (
        with_tensor("layers.1.0", lambda t: t[:, 1:]),
        r"layers\.1\.0 is \[1, 1, 8, 16\] .* carries \[1, 2, 8, 16\]",
    ),
    "fewer keys": (
        with_tensor("layers.0.0", lambda t: t[..., 1:, :]),
        r"layers\.0\.0 is \[1, 2, 1, 8\] .*\[1, 2, 2, 8\]",
    ),
    "more values": (
        with_tensor("layers.0.1", lambda t: t.repeat(1, 1, 9, 1)),
        r"layers\.0\.1 is \[1, 2, 18, 8\] .* carries \[1, 2, 5, 8\]",
    ),
    "another dimension": (with_tensor("hidden", lambda t: t[None].transpose(0, 1)), r"hidden is \[1, 1, 2, 32\]"),
    "half precision": (
        with_tensor("layers.0.0", torch.Tensor.half),
        r"layers\.0\.0 is .*float16, where .* of torch\.float32",
    ),
    "a wide memory": (with_tensor("layers.1.0", torch.Tensor.double), r"layers\.1\.0 is .*float64, where"),
}


@pytest.mark.parametrize("case", CANNOT_BE | DOES_NOT_FIT)
def test_a_state_that_cannot_be_is_refused_everywhere(case, kept, tmp_path):
    model, state = kept
    change, message = (CANNOT_BE | DOES_NOT_FIT)[case]
    wrong = dataclasses.replace(state, **change(state))
    before = dict(wrong.tensors), list(wrong.rows)
    with pytest.raises(ValueError, match=message):
        wrong.to_cache(model)
    assert (dict(wrong.tensors), list(wrong.rows)) == before
    path = tmp_path / "wrong.safetensors"
    if case in DOES_NOT_FIT:
        # Only the model can tell.
        wrong.save(path)
        with pytest.raises(ValueError, match=message):
            SleepState.load(path).to_cache(model)
        return
    with pytest.raises(ValueError, match=message):
        wrong.save(path)
    assert not path.exists()
    with mock.patch.object(SleepState, "_check"):
        wrong.save(path)
    with pytest.raises(ValueError, match=message):
        SleepState.load(path)


def test_counters_of_a_sliding_window_are_checked(tmp_path):
    """Counters by hand: after 13 tokens and 2 sleeps with a window of 5 and 1 sink, 5 are kept, and 9 is next."""
    model = sleeper(eviction="sliding")
    with torch.no_grad():
        state = put_away(model, model(tokens(13)[None], use_cache=True).cache, tmp_path)
    assert state.rows == [Counters(seen=13, fill=3, retained=5, position=9, sleeps=2)]
    state.to_cache(model)
    for wrong in ({"retained": 4}, {"position": 8}, {"sleeps": 1}):
        with pytest.raises(ValueError, match=r"row 0 has .* eviction='sliding' and num_sink_tokens=1 cannot leave"):
            dataclasses.replace(state, rows=[dataclasses.replace(state.rows[0], **wrong)]).to_cache(model)


def first_format(folder: Path, state: SleepState, **header) -> Path:
    """A file as hf_sleep wrote it before files had a digest."""
    fields = {name: getattr(state, name) for name in ("columns", "settings", "fingerprint", "dtype")}
    fields |= {"rows": [dataclasses.asdict(row) for row in state.rows]} | header
    metadata = {"format": "hf_sleep.state.v1", "version": "0.1.0", "state": json.dumps(fields)}
    tensors = {name: t.contiguous().clone() for name, t in state.tensors.items()}
    save_file(tensors, folder / "first.safetensors", metadata=metadata)
    return folder / "first.safetensors"


def test_a_file_of_the_first_format_loads_with_a_warning(kept, tmp_path):
    model, state = kept
    with pytest.warns(
        UserWarning, match="is of hf_sleep's first format and carries no digest, .* save it again"
    ) as said:
        old = SleepState.load(first_format(tmp_path, state))
    assert said[0].filename == __file__
    assert old.rows == state.rows
    assert same_tensors(old.to_cache(model), state.to_cache(model))
    old.save(tmp_path / "first.safetensors")
    SleepState.load(tmp_path / "first.safetensors").to_cache(model)


@pytest.mark.filterwarnings("ignore:.*carries no digest:UserWarning")
def test_a_padded_batch_of_the_first_format_reads_on_and_is_saved_again(tmp_path):
    """It did not say where pads stood: that stays unknown, and only the number of tokens is compared."""
    model, cache = sleeper(), SleepCache()
    ids, mask = pad([tokens(L + 3), tokens(4, 2)], "left")
    with torch.no_grad():
        model(ids, attention_mask=mask, cache=cache)
        state = SleepState.from_cache(model, cache)
        rows = [{name: getattr(row, name) for name in COUNTERS} for row in state.rows]
        old = SleepState.load(first_format(tmp_path, state, rows=rows)).to_cache(model)
        assert [row.pads for row in old.memory.counters] == [0, None]
        expected = model(ids, attention_mask=mask, cache=cache).logits
        assert torch.equal(model(ids, attention_mask=mask, cache=old).logits, expected)
    assert same_tensors(put_away(model, old, tmp_path).to_cache(model), cache)


@pytest.mark.filterwarnings("ignore:.*carries no digest:UserWarning")
def test_a_file_of_the_first_format_is_checked_as_far_as_it_can_be(kept, tmp_path):
    model, state = kept
    with pytest.raises(ValueError, match="row 0 has "):
        SleepState.load(first_format(tmp_path, state, rows=[dataclasses.asdict(Counters(seen=7, fill=9, sleeps=1))]))
    with pytest.raises(ValueError, match="its header is "):
        SleepState.load(first_format(tmp_path, state, rows=None))
    bad = dataclasses.replace(state, **DOES_NOT_FIT["a head less"][0](state))
    with pytest.raises(ValueError, match=DOES_NOT_FIT["a head less"][1]):
        SleepState.load(first_format(tmp_path, bad)).to_cache(model)
    data, rng = first_format(tmp_path, state).read_bytes(), random.Random(1)
    for _ in range(50):
        (tmp_path / "first.safetensors").write_bytes(damaged(data, rng.choice(("truncated", "appended")), rng))
        with pytest.raises(ValueError, match=r"first\.safetensors is (damaged|no sleep state)"):
            SleepState.load(tmp_path / "first.safetensors")


# A fresh retrofit.

ELSEWHERE = """
import json, sys
import torch
from hf_sleep import AutoModelForSleepLM, SleepState

torch.manual_seed(int(sys.argv[4]))
model = AutoModelForSleepLM.from_pretrained(sys.argv[1], sleep=json.loads(sys.argv[2]))
state = SleepState.load(sys.argv[3])
ids = torch.arange(1, 8)[None]
print(json.dumps(model(ids, cache=state.to_cache(model)).logits[0, -1].tolist()))
"""


def test_a_memory_of_a_fresh_retrofit_goes_on_in_a_new_process(tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    sleep = {"window_size": L, "block_layers": [0, 2]}
    model = AutoModelForSleepLM.from_pretrained(tmp_path / "base", sleep=sleep)
    with torch.no_grad():
        cache = model(tokens(L)[None], use_cache=True).cache
        state = put_away(model, cache, tmp_path)
        expected = model(torch.arange(1, 8)[None], cache=cache).logits[0, -1]
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, tmp_path / "base", json.dumps(sleep), tmp_path / "state.safetensors", "7"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(torch.tensor(json.loads(run.stdout)), expected, rtol=0, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"saved by another model .*save_pretrained\(folder\).* load it with AutoModel"
    ):
        state.to_cache(redrawn(model))


def redrawn(model: SleepForCausalLM) -> SleepForCausalLM:
    for block in model.fast_weights.values():
        block.init_weights(0.02)
    return model


def block_values(model: SleepForCausalLM) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.fast_weights.named_parameters()}


@pytest.mark.parametrize("half_lives", [(0.25, 16.0), None])
@pytest.mark.parametrize("kind", ["jet", "gated_delta_net"])
def test_fresh_blocks_follow_from_the_base_alone(kind, half_lives):
    def fresh(seed=0, dtype=torch.float32):
        sleep = sleep_config("llama", block_kind=kind, block_half_lives=half_lives)
        return SleepForCausalLM.from_base(make_base("llama", dtype, seed), sleep)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    mine = block_values(fresh())
    torch.manual_seed(2)
    again, other = block_values(fresh()), block_values(fresh(seed=1))
    drawn = [name for name, value in mine.items() if not torch.equal(value, other[name])]
    assert all(torch.equal(value, again[name]) for name, value in mine.items())
    # All but ones, zeros, the identity and half-lives are drawn, by layer and with the spread that they ought to have.
    for layer in ("0", "2"):
        gates = {f"{layer}.mixer.{name}" for name in ("A_log", "dt_bias")}
        assert gates & set(drawn) == (set() if half_lives else gates)
        assert f"{layer}.mixer.q_proj.weight" in drawn
        assert abs(mine[f"{layer}.mixer.q_proj.weight"].std() - 0.02) < 0.002
    assert not any(torch.equal(mine[name], mine[name.replace("0.", "2.", 1)]) for name in drawn if name[0] == "0")
    # The same in another dtype, rounded to it; gates are kept wide.
    for dtype in (torch.bfloat16, torch.double):
        for name, value in block_values(fresh(dtype=dtype)).items():
            is_gate = name.endswith(("A_log", "dt_bias"))
            assert value.dtype == (torch.promote_types(dtype, torch.float32) if is_gate else dtype)
            assert torch.equal(value, mine[name].to(value.dtype))
    # Torch's generator is left alone, and gives others.
    torch.set_rng_state(before)
    model = SleepForCausalLM.from_base(make_base("llama"), sleep_config("llama", block_kind=kind))
    drawn_state = torch.get_rng_state()
    torch.set_rng_state(before)
    make_base("llama")
    assert torch.equal(torch.get_rng_state(), drawn_state)
    assert not torch.equal(block_values(redrawn(model))["0.mixer.q_proj.weight"], mine["0.mixer.q_proj.weight"])


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
