"""What `hf-sleep bench` and benchmarks/peers.py measure, and what they measure it with."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from families import make_base, make_config, make_model, sleep_config
from helpers import assert_close, byte_tokenizer, save_tiny_llama
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hf_sleep import SleepCache, SleepConfig
from hf_sleep.cli.measure import TensorBytes, measure
from hf_sleep.cli.readers import FullCache, Sleeping, StreamingLLM, cache_bytes
from hf_sleep.compat import CACHE
from hf_sleep.info import describe

MOST, SINKS, BLOCK = 12, 2, 3


def one_layer() -> LlamaForCausalLM:
    """A base whose keys and values depend on a token and its place alone."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def ids(tokens: int) -> torch.Tensor:
    return torch.randint(3, 50, (1, tokens), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
@pytest.mark.parametrize("calls", [(24,), (5, 14, 5), (1,) * 24], ids=str)
def test_streaming_llm_attends_to_sinks_and_the_last_tokens_by_their_places(calls):
    lm, text = one_layer(), ids(24)
    reader, place, kept = StreamingLLM(lm, MOST, SINKS), 0, []
    for call in calls:
        logits = reader(text[:, place : place + call])
        for block in text[0, place : place + call].split(BLOCK):
            if len(kept) + len(block) > MOST:
                kept = kept[:SINKS] + kept[-(MOST - BLOCK - SINKS) :]
            kept += block.tolist()
        place += call
        assert_close(logits, lm(torch.tensor([kept])).logits[:, -1:], 1e-5)  # RoPE's tables are fp32
        assert reader.cache.get_seq_length() == len(kept) <= MOST
    assert reader.num_bytes() == len(kept) * 2 * 2 * 8 * 8


@torch.inference_mode()
def test_streaming_llm_is_the_base_while_nothing_has_to_go():
    lm, text = make_base("llama", torch.double), ids(MOST)
    assert_close(StreamingLLM(lm, MOST, SINKS)(text), lm(text, logits_to_keep=1).logits, 1e-9)


def test_streaming_llm_refuses_what_it_cannot_be():
    with pytest.raises(ValueError, match="the base has sliding_attention layers"):
        StreamingLLM(make_base("gemma3"), MOST)
    with pytest.raises(ValueError, match=r"StreamingLLM\.most=5 cannot work: .* more than 4 sinks and a block"):
        StreamingLLM(one_layer(), 5)


def test_bytes_of_tensors_are_counted_while_they_live():
    with TensorBytes() as counted:
        a = torch.zeros(100)
        b = a + 1
        a.add_(1)
        b[10:].view(9, 10)
        assert (counted.alive, counted.peak) == (800, 800)
        del b
        assert counted.alive == 400
        a.split(50)
    assert (counted.alive, counted.peak) == (400, 800)


def test_tensors_that_were_there_are_not_counted():
    """Weights of experts are indexed, and those of linear layers transposed."""
    weight = torch.zeros(8, 100)
    with TensorBytes() as counted:
        weight[1], weight.t(), weight.detach(), weight.add_(1)
        assert counted.peak == 0
        made = weight[1] + 1
    assert counted.peak == made.nbytes


def test_a_base_that_loops_is_measured_without_streaming_llm():
    config = make_config("ouro")
    config.total_ut_steps = 3
    with pytest.raises(ValueError, match="KV cache of one pass, and the base loops 3 times"):
        StreamingLLM(AutoModelForCausalLM.from_config(config), MOST)


@pytest.mark.parametrize("counted_apart", [True, False])
def test_every_reader_is_measured_on_the_same_text(counted_apart):
    model, text = make_model("llama", sleep_config("llama", window_size=8, sleep_passes=3)), ids(24)
    made: dict[str, list] = {"base": [], "three": [], "one": []}

    def keep(name, make):
        made[name].append(reader := make())
        return reader

    readers = {"base": partial(FullCache, model.lm), "three": partial(Sleeping, model)}
    readers |= {"one": partial(Sleeping, model, 1)}
    found = measure({n: partial(keep, n, of) for n, of in readers.items()}, text, 2, 3, counted_apart)
    assert {name: len(readers) for name, readers in made.items()} == dict.fromkeys(made, 4 + counted_apart)
    full, asleep = DynamicCache(config=model.lm.config), SleepCache()
    with torch.inference_mode():
        model.lm(text, use_cache=True, **{CACHE: full})
        model(text, cache=asleep)
    assert found["base"].bytes_held == cache_bytes(full)
    assert found["three"].bytes_held == asleep.num_bytes()
    for name, of in found.items():
        assert of.peak_bytes > of.bytes_held
        assert of.read_tokens_per_second == pytest.approx(24 / of.first_token_seconds)
        assert of.decode_ms_per_token > 0
        assert (of.seconds_per_sleep is None) == (name == "base")
    last = made["three"][-1]
    assert len(last.sleeps) == 3  # two while it read, and one for the first token that it decoded
    assert last.cache.memory.counters[0].seen == 26
    assert made["base"][-1].cache.get_seq_length() == 26
    assert made["one"][-1].cache.memory.counters[0].sleeps == 3


def test_a_reader_sleeps_with_its_own_number_of_passes():
    model, text = make_model("llama", sleep_config("llama", window_size=8)), ids(17)
    passes: list[int] = []
    for n in (None, 1, 4):
        with model.on_sleep(lambda event: passes.append(event.sleep_passes)), torch.inference_mode():
            Sleeping(model, n)(text)
    assert passes == [model.config.sleep.sleep_passes] * 2 + [1, 1, 4, 4]


@pytest.fixture
def peers():
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    verbosity = logging.get_verbosity()
    try:
        import peers

        yield peers
    finally:
        sys.path.pop(0)
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def test_the_peers_hold_as_many_bytes_as_hard_eviction_at_a_full_window(peers, monkeypatch):
    monkeypatch.setattr(peers, "WINDOW", 32)
    base = make_base("llama")
    readers, kept = peers.ours(base, (1, 2))
    assert list(readers) == [f"ours, {style}, N = {n}" for style in ("hard", "sliding") for n in (1, 2)]
    held = {}
    with torch.inference_mode():
        for name, make in readers.items():
            reader = make()
            reader(ids(96))
            held[name] = reader.num_bytes()
        full = FullCache(base)
        full(ids(kept))
    most = held["ours, hard, N = 2"]
    assert 0 <= most - full.num_bytes() < full.num_bytes() / kept
    sleep = SleepConfig(window_size=16, eviction="sliding", num_sink_tokens=4)
    assert held["ours, sliding, N = 2"] == describe(base.config, sleep, base.dtype).num_bytes


def test_a_row_is_a_ratio_to_the_base_in_its_own_process(peers):
    measured = {"base": {"bytes_held": 8, "seconds_per_sleep": None}, "A": {"bytes_held": 2, "seconds_per_sleep": 0.5}}
    base, a = peers.rows_of(measured, "kvpress", "kvpress ")
    assert (base["who"], a["who"]) == ("base, in kvpress's process", "kvpress A")
    assert (base["ratio"], a["ratio"]) == ({"bytes_held": 1}, {"bytes_held": 0.25})


def test_figures_of_other_lengths_stay_in_the_file(peers, tmp_path):
    file, found = tmp_path / "peers.json", {"window": 8, "lengths": [{"tokens": 9, "rows": [1]}]}
    assert peers.with_other_lengths(found, file) == found
    file.write_text(json.dumps(found), encoding="utf-8")
    more = {"window": 8, "lengths": [{"tokens": 4, "rows": []}, {"tokens": 9, "rows": [2]}]}
    lengths = peers.with_other_lengths(more, file)["lengths"]
    assert [(length["tokens"], length["rows"]) for length in lengths] == [(4, []), (9, [2])]
    with pytest.raises(SystemExit, match="was measured with other window"):
        peers.with_other_lengths(more | {"window": 9}, file)


def test_kvpress_counts_as_installed_in_the_pinned_releases_alone(peers, monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "OVERLAY", tmp_path / "kvpress")
    assert not peers.is_installed()
    for pin in peers.PINNED:
        name, _, release = pin.partition("==")
        folder = tmp_path / "kvpress" / f"{name}-{release}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Name: {name.replace('_', '-')}\nVersion: {release}\n", encoding="utf-8")
    assert peers.is_installed()
    (folder / "METADATA").write_text(f"Name: {name}\nVersion: 0.0.1\n", encoding="utf-8")
    assert not peers.is_installed()


def test_peers_says_that_kvpress_is_not_there_and_draws_the_rest(peers, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peers, "WINDOW", 32)
    monkeypatch.setattr(peers, "OVERLAY", tmp_path / "nothing")
    model = save_tiny_llama(tmp_path / "model", byte_tokenizer())
    file, picture = tmp_path / "peers.json", tmp_path / "peers.png"
    arguments = ["--model", model, "--dtype", "float32", "--tokens", "80", "96", "--decode", "1", "--passes", "1"]
    monkeypatch.setattr(sys, "argv", ["peers.py", *arguments, "--json", str(file), "--plot", str(picture)])
    peers.main()
    assert "kvpress is not installed, so it is not measured" in capsys.readouterr().out
    found = json.loads(file.read_text(encoding="utf-8"))
    names = ["base", "StreamingLLM", "ours, hard, N = 1", "ours, sliding, N = 1"]
    for length, tokens in zip(found["lengths"], (80, 96), strict=True):
        assert (length["tokens"], length["kvpress"]) == (tokens, peers.NOT_THERE)
        assert [row["who"] for row in length["rows"]] == names
        base, *others = length["rows"]
        assert base["bytes_held"] > others[0]["bytes_held"] > 0
        assert set(base["ratio"].values()) == {1}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_make_bench_shows_the_peers_of_the_model_it_has_loaded(peers, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peers, "OVERLAY", tmp_path / "nothing")
    base = LlamaForCausalLM.from_pretrained(save_tiny_llama(tmp_path / "model", byte_tokenizer()))
    peers.in_short(base.eval(), quick=True)
    shown = capsys.readouterr().out
    assert "1,024 tokens" in shown
    assert "StreamingLLM" in shown
    assert "ours, hard, N = 1" in shown
