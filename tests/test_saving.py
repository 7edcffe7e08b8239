"""Checkpoints: sharded, of new weights only, on other dtypes and devices, and what cannot be loaded again."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from families import make_base, make_model, randomize, sleep_config, tokens
from safetensors import safe_open
from test_laws import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_sleep import AutoModelForSleepLM, SleepCache, SleepConfig, SleepForCausalLM

L = 6
LOADERS = (SleepForCausalLM, AutoModelForSleepLM, AutoModelForCausalLM)
IDS = tokens(2 * L + 3)[None]


def stored(folder: Path) -> dict[str, tuple]:
    """Names and shapes of the tensors in all files of a checkpoint; a name that is there twice is an error."""
    shapes: dict[str, tuple] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            assert not shapes.keys() & set(names)
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    return shapes


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def assert_same_weights(a: SleepForCausalLM, b: SleepForCausalLM) -> None:
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@functools.cache
def saved_base(family: str, root: Path, seed: int = 0) -> Path:
    """A base checkpoint, written once per family. Shared: nothing may change it."""
    folder = root / f"{family}-{seed}"
    make_base(family, seed=seed).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    return functools.partial(saved_base, root=tmp_path_factory.mktemp("bases"))


def retrofit(folder: Path, **kwargs) -> SleepForCausalLM:
    """A base checkpoint with trained blocks."""
    kwargs.setdefault("sleep", sleep_config("llama", window_size=L, block_kind="gated_delta_net", sleep_passes=3))
    model = AutoModelForSleepLM.from_pretrained(folder, **kwargs).eval()
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    randomize(model.fast_weights, 1)
    assert dtypes == {name: parameter.dtype for name, parameter in model.named_parameters()}
    return model


# Whole checkpoints.


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_next"])
def test_shards_hold_every_tensor_once(family, tmp_path):
    model = make_model(family, sleep_config(family, window_size=L))
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    shapes = stored(tmp_path)
    tied = model.lm.config.tie_word_embeddings
    assert tied is (family == "qwen3")
    assert sum("lm_head" in name or "embed_tokens" in name for name in shapes) == (1 if tied else 2)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == sum(p.numel() for p in model.parameters())
    for loader in LOADERS:
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is SleepForCausalLM
        assert not loaded.training
        assert_same_weights(loaded, model)
        assert (loaded.lm.lm_head.weight is loaded.lm.model.embed_tokens.weight) is tied


def test_a_base_folder_is_retrofitted_with_the_settings_given(bases):
    sleep = SleepConfig(window_size=L, num_blocks=2, sleep_passes=3)
    model = AutoModelForSleepLM.from_pretrained(bases("llama"), sleep=sleep)
    assert model.config.sleep == sleep.resolve(model.lm.config)
    assert list(model.fast_weights) == ["1", "3"]
    assert all(block.is_untrained for block in model.fast_weights.values())
    assert model.config.base_model_name_or_path == str(bases("llama"))
    base = AutoModelForCausalLM.from_pretrained(bases("llama"))
    assert torch.equal(model(IDS[:, :L]).logits, base(IDS[:, :L]).logits)
    assert AutoModelForSleepLM.from_pretrained(bases("llama")).config.sleep == SleepConfig().resolve(base.config)


def test_a_mixture_of_experts_is_retrofitted_as_it_is_loaded(bases):
    model = AutoModelForSleepLM.from_pretrained(bases("qwen3_next"), sleep=sleep_config("qwen3_next", window_size=L))
    assert model(IDS).logits.isfinite().all()


def test_a_checkpoint_can_be_told_to_sleep_otherwise_but_not_to_have_other_blocks(bases, tmp_path):
    model = retrofit(bases("llama"))
    model.save_pretrained(tmp_path)
    asked = SleepConfig(window_size=L - 2, sleep_passes=2, eviction="sliding", num_sink_tokens=1, loop_layers=(1, 3))
    other = AutoModelForSleepLM.from_pretrained(tmp_path, sleep=asked)
    sleep = other.config.sleep
    assert (sleep.window_size, sleep.sleep_passes, sleep.eviction, sleep.loop_layers) == (L - 2, 2, "sliding", (1, 3))
    assert (sleep.block_kind, sleep.block_layers) == ("gated_delta_net", (0, 2))
    assert_same_weights(other, model)
    cache = other(IDS, use_cache=True).cache
    assert cache.rows[0].sleeps == (2 * L + 2) // (L - 2)
    AutoModelForSleepLM.from_pretrained(tmp_path, sleep=SleepConfig(block_layers=(0, 2), block_num_heads=2))
    for field, value in {"block_layers": (0, 3), "num_blocks": 1, "block_num_heads": 4, "block_expand_v": 1.0}.items():
        with pytest.raises(
            ValueError, match=rf"SleepConfig\.{field}=.* cannot work: the checkpoint's blocks have {field}="
        ):
            AutoModelForSleepLM.from_pretrained(tmp_path, sleep=SleepConfig(**{field: value}))


def test_it_is_made_with_from_pretrained():
    with pytest.raises(OSError, match=r"AutoModelForSleepLM\.from_pretrained"):
        AutoModelForSleepLM()


# New weights only.


@pytest.mark.parametrize("shards", [None, "5KB"])
def test_new_weights_alone_are_enough_with_the_base(shards, bases, tmp_path):
    model = retrofit(bases("qwen3"))
    model.save_pretrained(tmp_path / "all")
    model.save_pretrained(tmp_path / "new", only_sleep=True, **({"max_shard_size": shards} if shards else {}))
    assert model.config.only_sleep is False
    shapes = stored(tmp_path / "new")
    assert shapes.keys() == {f"fast_weights.{name}" for name in model.fast_weights.state_dict()}
    assert (len(list((tmp_path / "new").glob("*.safetensors"))) > 1) is (shards is not None)
    assert size_of(tmp_path / "new") < 0.5 * size_of(tmp_path / "all")
    expected = model(IDS).logits
    for loader in LOADERS:
        loaded = loader.from_pretrained(tmp_path / "new")
        assert type(loaded) is SleepForCausalLM
        assert loaded.config.sleep == model.config.sleep
        assert_same_weights(loaded, model)
        assert torch.equal(loaded(IDS).logits, expected)
    # What was loaded so can be saved whole, and again alone.
    loaded.save_pretrained(tmp_path / "whole")
    assert_same_weights(SleepForCausalLM.from_pretrained(tmp_path / "whole"), model)
    loaded.save_pretrained(tmp_path / "again", only_sleep=True)
    assert stored(tmp_path / "again") == shapes


def test_a_base_that_is_gone_or_another_is_named(bases, tmp_path):
    base = shutil.copytree(bases("llama"), tmp_path / "base")
    retrofit(base).save_pretrained(tmp_path / "new", only_sleep=True)
    base.rename(tmp_path / "moved")
    with pytest.raises(OSError, match=str(tmp_path / "base")):
        SleepForCausalLM.from_pretrained(tmp_path / "new")
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(num_attention_heads=4, **sizes)).save_pretrained(base)
    with pytest.raises(
        ValueError, match="num_hidden_layers=2, the fast weights were made for 4: base_model_name_or_path"
    ):
        SleepForCausalLM.from_pretrained(tmp_path / "new")
    shutil.rmtree(base)
    shutil.copytree(bases("qwen2"), base)
    with pytest.raises(ValueError, match="model_type='qwen2', the fast weights were made for 'llama'"):
        SleepForCausalLM.from_pretrained(tmp_path / "new")


def test_new_weights_of_other_blocks_are_refused(bases, tmp_path):
    retrofit(bases("llama")).save_pretrained(tmp_path, only_sleep=True)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["sleep"] |= {"block_layers": [0, 3]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"does not hold this model's fast weights: missing \['fast_weights\.3"):
        SleepForCausalLM.from_pretrained(tmp_path)


def test_new_weights_alone_are_not_saved_where_they_could_not_be_loaded(bases, tmp_path):
    in_memory = make_model("llama", sleep_config("llama"))
    with pytest.raises(
        ValueError, match=r"needs to know where the base comes from.* set config\.base_model_name_or_path"
    ):
        in_memory.save_pretrained(tmp_path / "new", only_sleep=True)
    in_memory.config.base_model_name_or_path = str(bases("llama"))
    in_memory.save_pretrained(tmp_path / "new", only_sleep=True)
    assert_same_weights(SleepForCausalLM.from_pretrained(tmp_path / "new"), in_memory)
    hybrid = AutoModelForSleepLM.from_pretrained(bases("qwen3_5"))
    with pytest.raises(ValueError, match="no injected blocks, its fast weights are the base's own layers"):
        hybrid.save_pretrained(tmp_path / "hybrid", only_sleep=True)
    assert not (tmp_path / "hybrid").exists()


def test_new_weights_alone_are_taken_from_a_gathered_state_dict(bases, tmp_path):
    model = retrofit(bases("llama"))
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    randomize(model.fast_weights, 5)
    model.save_pretrained(tmp_path, only_sleep=True, state_dict=gathered)
    loaded = SleepForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, gathered[name]) for name, tensor in loaded.state_dict().items())


def test_new_weights_alone_are_found_in_a_subfolder(bases, tmp_path):
    model = retrofit(bases("llama"))
    model.save_pretrained(tmp_path / "new", only_sleep=True)
    assert_same_weights(SleepForCausalLM.from_pretrained(tmp_path, subfolder="new"), model)


@pytest.mark.parametrize("what", ["base", "new weights"])
def test_loading_info_is_given_where_it_is_asked_for(what, bases, tmp_path):
    retrofit(bases("llama")).save_pretrained(tmp_path, only_sleep=True)
    folder = bases("llama") if what == "base" else tmp_path
    model, report = AutoModelForSleepLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is SleepForCausalLM
    assert not report["unexpected_keys"]


def test_a_dictionary_changes_just_those_fields(bases, tmp_path):
    model = retrofit(bases("llama"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSleepLM.from_pretrained(tmp_path, sleep={"sleep_passes": 4})
    assert loaded.config.sleep == dataclasses.replace(model.config.sleep, sleep_passes=4)
    with pytest.raises(ValueError, match=r"block_kind='jet' cannot work"):
        AutoModelForSleepLM.from_pretrained(tmp_path, sleep={"block_kind": "jet"})
    fresh = AutoModelForSleepLM.from_pretrained(bases("llama"), sleep={"window_size": 7, "num_blocks": 2})
    assert (fresh.config.sleep.window_size, fresh.config.sleep.num_blocks) == (7, 2)


def test_new_weights_alone_are_refused_where_the_base_has_learned_too(bases, tmp_path):
    model = retrofit(bases("llama"))
    model.save_pretrained(tmp_path / "before", only_sleep=True)
    with torch.no_grad():
        model.lm.model.norm.weight.mul_(2)
    with pytest.raises(ValueError, match="lose what the base learned"):
        model.save_pretrained(tmp_path / "after", only_sleep=True)
    assert not (tmp_path / "after").exists()


def test_new_weights_on_another_base_of_the_same_shape_warn(bases, tmp_path, monkeypatch):
    retrofit(bases("llama")).save_pretrained(tmp_path, only_sleep=True)
    warnings = []
    monkeypatch.setattr("hf_sleep.modeling.logger.warning", warnings.append)
    SleepForCausalLM.from_pretrained(tmp_path)
    assert not warnings
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(bases("llama", seed=1))
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    SleepForCausalLM.from_pretrained(tmp_path)
    assert len(warnings) == 1
    assert "other weights" in warnings[0]


def test_a_quantised_base_is_not_written(bases, tmp_path):
    model = retrofit(bases("llama"))
    model.lm.hf_quantizer = object()
    with pytest.raises(ValueError, match=r"quantised .* use save_pretrained\(\.\.\., only_sleep=True\)"):
        model.save_pretrained(tmp_path / "all")
    assert not (tmp_path / "all").exists()
    model.save_pretrained(tmp_path / "new", only_sleep=True)
    assert torch.equal(SleepForCausalLM.from_pretrained(tmp_path / "new")(IDS).logits, model(IDS).logits)


# Dtypes.


@pytest.mark.parametrize("only_sleep", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_half_precision_keeps_the_gates_whole(family, dtype, only_sleep, bases, tmp_path):
    name = str(dtype).removeprefix("torch.")
    blocks = {"block_num_heads": 2, "block_head_dim": 8, "block_layers": (0, 2)}
    model = retrofit(bases(family), dtype=name, sleep=SleepConfig(window_size=L, **blocks))
    model.save_pretrained(tmp_path, only_sleep=only_sleep)
    for loaded in (model, SleepForCausalLM.from_pretrained(tmp_path, dtype=name)):
        for parameter_name, parameter in loaded.named_parameters():
            gate = parameter_name.rsplit(".", 1)[-1] in ("A_log", "dt_bias")
            if parameter_name.startswith("fast_weights"):
                assert parameter.dtype == (torch.float32 if gate else dtype), parameter_name
                assert torch.equal(parameter, model.get_parameter(parameter_name)), parameter_name
            elif not gate:
                assert parameter.dtype == dtype, parameter_name
        assert loaded.dtype == dtype
        out = loaded(IDS, use_cache=True)
        assert out.logits.dtype == dtype
        assert out.logits.isfinite().all()
        cache = out.cache
        for slot in cache.fast_slots:
            assert cache.tensors.layers[slot][0].dtype == torch.float32
            assert cache.tensors.layers[slot][1].dtype == dtype
        said = loaded.generate(IDS, max_new_tokens=L + 1, do_sample=False, pad_token_id=0)
        assert said.shape == (1, 3 * L + 4)
        loaded.train()(IDS, labels=IDS).loss.backward()
        assert all(block.mixer.A_log.grad.abs().max() > 0 for block in loaded.fast_weights.values())
        assert all(p.grad.isfinite().all() for p in loaded.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3_5", "olmo_hybrid"])
def test_a_checkpoint_loaded_in_half_precision_keeps_the_values_of_all_gates(family, dtype, tmp_path):
    """The hybrid's own, too: rounded decay is forgetting at another rate."""
    model = make_model(family, sleep_config(family, window_size=L))
    model.save_pretrained(tmp_path)
    loaded = SleepForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    gates = [name for name, _ in model.named_parameters() if name.endswith(("A_log", "dt_bias"))]
    assert len(gates) == (4 if family == "llama" else 6)
    for name in gates:
        assert loaded.get_parameter(name).dtype == torch.float32
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))


# Devices.

ON_CPU = {f"lm.model.{part}": "cpu" for part in ("embed_tokens", "rotary_emb", "norm")} | {"lm.lm_head": "cpu"}
LAYERS = {f"lm.model.layers.{i}": "cpu" for i in range(4)}
MAPS = {
    "auto": "auto",
    "attention on disk": ON_CPU
    | LAYERS
    | {"lm.model.layers.1": "disk", "lm.model.layers.3": "disk", "fast_weights": "cpu"},
    "base on disk": {"lm": "disk", "fast_weights": "cpu"},
    "blocks on disk": {"lm": "cpu", "fast_weights": "disk"},
}


@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
@pytest.mark.parametrize("where", MAPS)
def test_a_model_may_be_spread_over_devices(family, where, tmp_path):
    model = make_model(family, sleep_config(family, window_size=L))
    model.save_pretrained(tmp_path)
    spread = SleepForCausalLM.from_pretrained(tmp_path, device_map=MAPS[where], offload_folder=tmp_path / "offload")
    assert any(p.device.type == "meta" for p in spread.parameters()) is (where != "auto")
    cache, expected = SleepCache(), SleepCache()
    with torch.no_grad():
        for part in IDS.split([4, 1, 2, 8], 1):
            logits = spread(part, cache=cache).logits
            # Weights mapped from a file may lie unaligned, and then a matmul takes another kernel.
            assert_close(logits, model(part, cache=expected).logits, 1e-5)
        spread.sleep(cache)
    said = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(spread.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0), said)


def test_a_base_on_disk_is_retrofitted(bases, tmp_path):
    where = {"model": "disk", "lm_head": "cpu"}
    model = AutoModelForSleepLM.from_pretrained(
        bases("llama"),
        sleep=sleep_config("llama", window_size=L),
        device_map=where,
        offload_folder=tmp_path,
    )
    assert {p.device.type for p in model.fast_weights.parameters()} == {"cpu"}
    assert {p.device.type for p in model.lm.model.parameters()} == {"meta"}
    plain = AutoModelForSleepLM.from_pretrained(bases("llama"), sleep=sleep_config("llama", window_size=L))
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
