"""SleepStore: what was read once continues from there, from any process, and bad files stop nobody."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from helpers import words
from test_session import GREEDY, L, close, copies, same, session

from hf_sleep import SleepState, SleepStore, cache_from


def stored(store, **fields):
    return session(dtype=torch.float32, settings={"store": store}, **fields)


def read_by_model(s, text) -> int:
    """Tokens that the model ran over while it read a text."""
    ran = []
    handle = s.model.lm.get_input_embeddings().register_forward_hook(lambda m, args, out: ran.append(args[0].numel()))
    s.read(text)
    handle.remove()
    return sum(ran)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.sleep"))


@pytest.mark.parametrize("eviction", ["hard", "sliding+sink"])
@pytest.mark.parametrize("passes", [1, 3])
def test_a_beginning_that_was_read_before_is_not_read_again(eviction, passes, tmp_path):
    store, text = SleepStore(tmp_path / "store"), words(3 * L + 4)
    first = stored(store, eviction=eviction, sleep_passes=passes)
    assert read_by_model(first, text) >= 3 * L + 4
    assert len(files(tmp_path)) == 3
    again = stored(store, eviction=eviction, sleep_passes=passes)
    # One token more, with which a state's shapes are compared.
    assert read_by_model(again, text) == 4 + 1 + 1 + 1
    assert same(copies(again), copies(first))
    assert again.report().sleep_passes == first.report().sleep_passes == [passes] * 3
    assert again._held.chain == first._held.chain
    assert again.ask(words(2), **GREEDY) == first.ask(words(2), **GREEDY)
    again.rollback()
    first.rollback()
    assert same(copies(again), copies(first))
    other = stored(store, eviction=eviction, sleep_passes=passes)
    assert read_by_model(other, f"{words(2 * L + 3)} {words(L, 9)}") <= L + 3 + 3  # two windows in common
    without = session(dtype=torch.float32, eviction=eviction, sleep_passes=passes)
    without.read(f"{words(2 * L + 3)} {words(L, 9)}")
    assert same(copies(other), copies(without))


def test_other_models_settings_passes_and_sleeps_find_nothing(tmp_path):
    store, text = SleepStore(tmp_path / "store"), words(2 * L + 4)
    stored(store).read(text)
    count = len(files(tmp_path))
    for fields in ({"sleep_passes": 3}, {"eviction": "sliding"}, {"family": "qwen3"}, {"loop_layers": (1, 3)}):
        s = stored(store, **fields)
        assert read_by_model(s, text) >= 2 * L + 4, fields
        assert len(files(tmp_path)) > count
        count = len(files(tmp_path))
    s = stored(store)
    s.read(words(4))
    s.sleep()
    plain = session(dtype=torch.float32)
    plain.read(words(4))
    plain.sleep()
    for one in (s, plain):
        one.read(words(2 * L, 1))
    assert same(copies(s), copies(plain))


def test_generate_takes_a_prompt_s_beginning_from_the_store(tmp_path):
    store, s = SleepStore(tmp_path / "store"), session(dtype=torch.float32)
    ids = torch.tensor([s.tokenizer(words(3 * L + 1)).input_ids])
    plain = s.model.generate(ids, **GREEDY)
    for _ in range(2):
        cache = cache_from(store, s.model, ids)
        assert cache.get_seq_length() == 3 * L
        assert torch.equal(s.model.generate(ids, cache=cache, **GREEDY), plain)
    assert len(files(tmp_path)) == 2  # the third window is full, and no token has come after it
    with pytest.raises(ValueError, match=r"input_ids has shape \(1, 1\): it must be \[1, T\], with at least 2"):
        cache_from(store, s.model, ids[:, :1])


def test_the_least_recently_used_go_first(tmp_path):
    texts = [words(L + 2, seed) for seed in range(4)]
    stored(SleepStore(tmp_path / "a")).read(texts[0])
    size = files(tmp_path / "a")[0].stat().st_size
    store = SleepStore(tmp_path / "b", max_bytes=3 * size + 100)
    for i, text in enumerate(texts[:3]):
        stored(store).read(text)
        for file in files(tmp_path / "b"):
            os.utime(file, (time.time() - 100 + i, file.stat().st_mtime - 10))
    assert read_by_model(stored(store), texts[0]) < L  # used again
    stored(store).read(texts[3])
    assert len(files(tmp_path / "b")) == 3
    assert store.num_bytes() <= 3 * size + 100
    assert read_by_model(stored(store), texts[0]) < L
    assert read_by_model(stored(store), texts[1]) > L
    store.clear()
    assert store.num_bytes() == 0
    with pytest.raises(ValueError, match="max_bytes=0"):
        SleepStore(tmp_path / "c", max_bytes=0)


def test_a_damaged_state_is_left_out_deleted_and_written_again(tmp_path):
    store, text = SleepStore(tmp_path / "store"), words(L + 3)
    first = stored(store)
    first.read(text)
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    for bad in (b"", whole[:-5], whole.replace(b"hf_sleep.state", b"hf_sleeq.state"), b"{}" * 50):
        file.write_bytes(bad)
        s = stored(store)
        assert read_by_model(s, text) > L
        assert same(copies(s), copies(first))
        assert SleepState.load(file).rows == SleepState.from_bytes(whole).rows


def test_a_private_text_never_reaches_the_store(tmp_path):
    store = SleepStore(tmp_path / "store")
    for secret in (words(3, 5), words(3, 6)):
        s = stored(store)
        s.read(words(4))
        s.read(secret, do_not_consolidate=True)
        s.read(words(L, 2))
        s.read(words(3, 3))
        plain = session(dtype=torch.float32)
        for text in (words(4), words(L, 2), words(3, 3)):
            plain.read(text)
        assert close(s._held.memory, plain._held.memory)
    assert len(files(tmp_path)) == 1


def _read_in_process(folder, barrier, index):
    torch.set_num_threads(1)
    s = stored(SleepStore(folder, max_bytes=40_000))
    barrier.wait()
    for seed in range(6):
        s.forget()
        s.read(words(3 * L, seed % 3), progress=False)
        plain = session(dtype=torch.float32)
        plain.read(words(3 * L, seed % 3), progress=False)
        assert same(copies(s), copies(plain)), (index, seed)


def test_processes_share_a_store(tmp_path):
    """Two write, read and delete the same states at once."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    workers = [context.Process(target=_read_in_process, args=(tmp_path / "store", barrier, i)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert not [file for file in tmp_path.rglob("*") if file.name.endswith(".part")]


def test_any_file_system_will_do():
    store = SleepStore("memory://states", max_bytes=10**9)
    store.clear()
    first = stored(store)
    first.read(words(L + 3))
    again = stored(store)
    assert read_by_model(again, words(L + 3)) < L
    assert same(copies(again), copies(first))
    store.clear()


def test_a_store_of_somebody_else_s_is_read(tmp_path, monkeypatch, caplog):
    store, text = SleepStore(tmp_path / "store"), words(L + 3)
    stored(store).read(text)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", refuse)
    for name in ("rm_file", "makedirs"):
        monkeypatch.setattr(type(store.files), name, refuse)
    assert read_by_model(stored(store), text) < L
    s = stored(store)
    s.read(words(L + 3, 5))
    assert s.report().sleeps == 1
    assert len(files(tmp_path)) == 1
    (file,) = files(tmp_path)
    file.write_bytes(b"{}")
    assert read_by_model(stored(store), text) > L
    with pytest.raises(PermissionError):
        store.clear()


def test_a_state_of_a_newer_release_is_left_where_it_is(tmp_path, monkeypatch):
    store, text = SleepStore(tmp_path / "store"), words(L + 3)
    stored(store).read(text)
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    monkeypatch.setattr("hf_sleep.state.FORMATS", {})
    assert read_by_model(stored(store), text) > L
    assert file.read_bytes() == whole


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    store = SleepStore(tmp_path / "store", max_bytes=10**9)
    stored(store).read(words(L + 3))
    folder = files(tmp_path)[0].parent
    old, new = folder / ".old.part", folder / ".new.part"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    stored(store).read(words(L + 3, 5))
    assert new.exists()
    assert not old.exists()
