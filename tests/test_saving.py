"""Checkpoints: sharded, of new weights only, on other dtypes and devices, and what cannot be loaded again."""

import copy
import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import make_base, make_model, randomize, sleep_config, tokens
from helpers import QUIET, assert_close, assert_same_weights, stored
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig
from transformers import initialization as init

from hf_sleep import (
    AutoModelForSleepLM,
    SleepCache,
    SleepConfig,
    SleepForCausalLM,
    SleepLMConfig,
    SleepState,
    registry,
)
from hf_sleep.engine import Between
from hf_sleep.registry import BETWEEN
from hf_sleep.state import fingerprint
from hf_sleep.training import SleepTrainer, SleepTrainingArguments, freeze_all_but_fast_weights
from hf_sleep.weights import checksum

L = 6
LOADERS = (SleepForCausalLM, AutoModelForSleepLM, AutoModelForCausalLM)
IDS = tokens(2 * L + 3)[None]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@functools.cache
def saved_base(family: str, root: Path, seed: int = 0) -> Path:
    """A base checkpoint, written once per family. Shared: nothing may change it."""
    folder = root / f"{family}-{seed}"
    make_base(family, seed=seed).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _any_processor(monkeypatch):
    """Act as one that multiplies in 16 bits. Others load such checkpoints in float32, which test_dtypes.py tests."""
    monkeypatch.setattr("hf_sleep.dtypes._cpu_multiplies", lambda dtype: True)


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
    assert list(model.fast_weights) == ["1", "2"]
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
    assert cache.memory.counters[0].sleeps == (2 * L + 2) // (L - 2)
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


class Shift(Between):
    def __init__(self, hidden_size: int):
        super().__init__(hidden_size)
        self.bias = nn.Parameter(torch.empty(hidden_size))

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        init.zeros_(self.bias)

    def forward(self, z: torch.Tensor, e: torch.Tensor | None) -> torch.Tensor:
        return z + self.bias


@pytest.mark.parametrize("only_sleep", [False, True])
def test_what_lies_between_passes_is_saved_with_the_blocks(only_sleep, bases, tmp_path, monkeypatch):
    monkeypatch.setitem(BETWEEN._classes, "shift", Shift)
    sleep = sleep_config("llama", window_size=L, sleep_passes=3, between="shift")
    model = retrofit(bases("llama"), sleep=sleep)
    assert not model.between.bias.any()
    plain = model(IDS).logits
    nn.init.normal_(model.between.bias)
    model.save_pretrained(tmp_path, only_sleep=only_sleep)
    assert "between.bias" in stored(tmp_path)
    loaded = SleepForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not torch.equal(loaded(IDS).logits, plain)


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
    hybrid = AutoModelForSleepLM.from_pretrained(bases("qwen3_5"), sleep={"between": "none"})
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


@pytest.mark.parametrize("how", ["added", "swapped"])
@pytest.mark.parametrize("again", [False, True])
def test_new_weights_alone_are_refused_where_one_row_of_the_embedding_has_learned(how, again, bases, tmp_path):
    """However few values it is: also of a whole checkpoint that was loaded in another dtype."""
    model = retrofit(bases("llama"))
    if again:
        model.save_pretrained(tmp_path / "whole")
        model = SleepForCausalLM.from_pretrained(tmp_path / "whole", dtype="bfloat16")
    model.save_pretrained(tmp_path / "before", only_sleep=True)
    digest, rows = fingerprint(model.lm), model.get_input_embeddings().weight
    with torch.no_grad():
        if how == "added":
            rows[3, 1] += 0.01
        else:
            rows[[3, 5], 1:3] = rows[[5, 3], 1:3]
    assert fingerprint(model.lm) == digest
    with pytest.raises(ValueError, match="lose what the base learned"):
        model.save_pretrained(tmp_path / "after", only_sleep=True)


def test_new_weights_alone_are_saved_of_a_checkpoint_from_before_there_was_a_checksum(bases, tmp_path):
    retrofit(bases("llama")).save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    assert len(config.pop("base_checksum")) == 64
    file.write_text(json.dumps(config), encoding="utf-8")
    old = SleepForCausalLM.from_pretrained(tmp_path / "whole")
    assert old.config.base_checksum is None
    old.save_pretrained(tmp_path / "alone", only_sleep=True)
    assert_same_weights(SleepForCausalLM.from_pretrained(tmp_path / "alone"), old)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2**20 + 3,)])
def test_a_checksum_is_of_every_value_and_of_no_dtype(shape):
    holder = torch.nn.Module()
    holder.a = torch.nn.Parameter(torch.randn(shape).bfloat16())
    found = {checksum(holder.to(dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.double)}
    assert len(found) == 1
    for at in {0, holder.a.numel() - 1} if holder.a.numel() else ():
        with torch.no_grad():
            holder.a.view(-1)[at] += 0.5
        found.add(checksum(holder))
    assert len(found) == 1 + len({0, holder.a.numel() - 1} if holder.a.numel() else ())


def test_new_weights_on_another_base_of_the_same_shape_warn(bases, tmp_path, monkeypatch):
    retrofit(bases("llama")).save_pretrained(tmp_path, only_sleep=True)
    warnings = []
    monkeypatch.setattr("hf_sleep.modeling.checkpoint.logger.warning", warnings.append)
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


@pytest.mark.parametrize("first", ["whole", "sharded", "new weights"])
@pytest.mark.parametrize("second", ["whole", "sharded", "new weights"])
@pytest.mark.parametrize("variant", [None, "fp8"])
def test_what_was_saved_last_is_loaded(first, second, variant, bases, tmp_path):
    ways = {"whole": {}, "sharded": {"max_shard_size": "20KB"}, "new weights": {"only_sleep": True}}
    (tmp_path / "model.bf16.safetensors").write_bytes(b"of another variant")
    for seed, way in enumerate((first, second)):
        model = retrofit(bases("llama"))
        randomize(model.fast_weights, 10 + seed)
        model.save_pretrained(tmp_path, variant=variant, **ways[way])
    again, report = SleepForCausalLM.from_pretrained(tmp_path, variant=variant, output_loading_info=True)
    assert not report["missing_keys"]
    assert_same_weights(again, model)
    assert (tmp_path / "model.bf16.safetensors").read_bytes() == b"of another variant"


def test_new_weights_alone_know_where_in_a_folder_their_base_is(bases, tmp_path):
    shutil.copytree(bases("llama"), tmp_path / "base" / "inner" / "model")
    how = {"sleep": sleep_config("llama", window_size=L), "subfolder": "inner/model"}
    model = AutoModelForSleepLM.from_pretrained(tmp_path / "base", **how)
    model.save_pretrained(tmp_path / "new", only_sleep=True)
    assert_same_weights(AutoModelForSleepLM.from_pretrained(tmp_path / "new"), model)
    elsewhere = AutoModelForSleepLM.from_pretrained(tmp_path / "new", base_model_name_or_path=str(bases("llama")))
    assert_same_weights(elsewhere, model)
    model.config.base_model_name_or_path = str(bases("llama"))
    model.save_pretrained(tmp_path / "moved", only_sleep=True)
    assert_same_weights(AutoModelForSleepLM.from_pretrained(tmp_path / "moved"), model)
    plain = AutoModelForSleepLM.from_pretrained(bases("llama"))
    assert "base_source" not in plain.config.to_dict()


def test_new_weights_alone_ask_for_the_revision_that_their_base_had(bases, tmp_path, monkeypatch):
    model = AutoModelForSleepLM.from_pretrained(bases("llama"), revision="v1")
    model.save_pretrained(tmp_path, only_sleep=True)
    asked = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: asked.append(k) or load(*a, **k))
    AutoModelForSleepLM.from_pretrained(tmp_path)
    assert [how["revision"] for how in asked] == ["v1"]


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
            assert cache.memory.carried[slot][0].dtype == torch.float32
            assert cache.memory.carried[slot][1].dtype == dtype
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


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
def test_a_retrofit_of_a_base_on_disk_is_saved_whole_and_trained(bases, tmp_path):
    where = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    where |= {"model.layers.3": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = retrofit(bases("llama"), device_map=where, offload_folder=tmp_path / "offload")
    logits = model(IDS).logits
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(SleepForCausalLM.from_pretrained(tmp_path / "whole")(IDS).logits, logits)
    model.save_pretrained(tmp_path / "new", only_sleep=True)
    again = SleepForCausalLM.from_pretrained(
        tmp_path / "new", device_map=where, offload_folder=tmp_path / "offload_again"
    )
    assert again.hf_device_map == model.hf_device_map
    freeze_all_but_fast_weights(again)
    rows = [{"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}] * 4
    trainer = SleepTrainer(again, SleepTrainingArguments(tmp_path, **QUIET | {"max_steps": 2}), train_dataset=rows)
    before = copy.deepcopy(again.fast_weights.state_dict())
    trainer.train()
    assert trainer.state.global_step == 2
    assert any(not torch.equal(before[name], t) for name, t in again.fast_weights.state_dict().items())


# Weights that are not there.

BLOCKS = {"block_num_heads": 2, "block_head_dim": 8, "block_layers": (0, 2)}


@pytest.fixture
def dirty_memory():
    """Memory that nobody wrote to holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_fresh(model: SleepForCausalLM, *, but: frozenset[str] = frozenset()) -> None:
    """Blocks as a retrofit makes them; the parameters named in `but` are not looked at."""
    assert model.fast_weights
    sleep = model.config.sleep
    for name, parameter in model.fast_weights.named_parameters():
        if f"fast_weights.{name}" in but:
            continue
        values = parameter.detach().float()
        assert values.isfinite().all(), name
        if name.endswith(("A_log", "dt_bias")) and sleep.block_half_lives is not None:
            assert parameter.dtype == torch.float32
            half_lives = math.log(2) / F.softplus(values) if name.endswith("dt_bias") else values.exp()
            ends = torch.tensor(sleep.block_half_lives) * sleep.window_size
            torch.testing.assert_close(half_lives, ends if name.endswith("dt_bias") else torch.ones(2))
        elif name.endswith("A_log"):
            assert parameter.dtype == torch.float32
            assert math.log(1e-4) <= values.min() <= values.max() <= math.log(16)
        elif name.endswith("dt_bias"):
            assert parameter.dtype == torch.float32
            step = F.softplus(values)
            assert 0.99e-3 <= step.min() <= step.max() <= 0.101
        elif name.endswith("o_proj.weight"):
            assert not values.any()
        elif name.endswith("norm.weight"):
            assert (values == 1).all()
        elif name.endswith("w2.bias"):
            taps = values.view(-1, 4)
            assert not taps[:, :3].any()
            assert (taps[:, 3] == 1).all()
        else:
            assert values.std() > 0, name


@pytest.mark.parametrize("half_lives", [(0.5, 4.0), None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", registry.BLOCKS.names())
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "ouro", "jet_nemotron"])
def test_a_model_made_from_its_config_is_an_untrained_retrofit(family, kind, dtype, half_lives, dirty_memory):
    text = make_base(family).config
    sleep = SleepConfig(window_size=L, block_kind=kind, block_half_lives=half_lives, **BLOCKS)
    models = [AutoModelForCausalLM.from_config(SleepLMConfig(text_config=text, sleep=sleep), dtype=dtype)]
    if dtype == "float32":
        models.append(SleepForCausalLM(SleepLMConfig(text_config=text, sleep=sleep)))
    for model in models:
        assert_fresh(model.eval())
        assert model.dtype == getattr(torch, dtype)
        assert all(p.isfinite().all() for p in model.parameters())
        ids = IDS[:, :L]
        assert torch.equal(model(ids).logits, model.lm(ids).logits)


@pytest.mark.parametrize("made", ["retrofit", "config", "init_weights"])
@pytest.mark.parametrize("window_size", [4, 20])
def test_half_lives_are_in_windows_whoever_sets_first_values(made, window_size):
    sleep = SleepConfig(window_size=window_size, block_half_lives=(0.5, 8.0), **BLOCKS | {"block_num_heads": 3})
    if made == "config":
        model = SleepForCausalLM(SleepLMConfig(text_config=make_base("llama").config, sleep=sleep))
    else:
        model = SleepForCausalLM.from_base(make_base("llama"), sleep)
    for block in model.fast_weights.values():
        if made == "init_weights":
            block.init_weights(0.5)
        with torch.no_grad():
            half_lives = -math.log(2) / block.mixer.decay(torch.zeros(1, 1, 32))[0, 0]
        torch.testing.assert_close(half_lives, window_size * torch.tensor([0.5, 2.0, 8.0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("only_sleep", [False, True])
def test_half_lives_at_first_are_saved_and_are_what_they_are(only_sleep, bases, tmp_path):
    model = retrofit(bases("llama"), sleep=SleepConfig(window_size=L, block_half_lives=(0.5, 4.0), **BLOCKS))
    with torch.no_grad():
        for block in model.fast_weights.values():
            block.mixer.dt_bias.add_(1.0)  # it has learned since
    with pytest.raises(ValueError, match=r"block_half_lives=\(1.0, 2.0\) cannot work: the checkpoint's blocks have"):
        model.sleeping(block_half_lives=(1.0, 2.0)).__enter__()
    model.save_pretrained(tmp_path, only_sleep=only_sleep)
    loaded = AutoModelForSleepLM.from_pretrained(tmp_path, sleep=SleepConfig(window_size=2 * L))
    assert loaded.config.sleep.block_half_lives == (0.5, 4.0)
    assert_same_weights(loaded, model)
    with pytest.raises(ValueError, match=r"block_half_lives=None cannot work"):
        AutoModelForSleepLM.from_pretrained(tmp_path, sleep={"block_half_lives": None})


@pytest.mark.parametrize("only_sleep", [False, True])
def test_a_checkpoint_from_before_there_were_half_lives_loads_as_it_was(only_sleep, bases, tmp_path):
    model = retrofit(bases("llama"), sleep=SleepConfig(window_size=L, block_half_lives=None, **BLOCKS))
    model.save_pretrained(tmp_path, only_sleep=only_sleep)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config["sleep"]["block_half_lives"]
    file.write_text(json.dumps(config), encoding="utf-8")
    state = SleepState.from_cache(model, model(IDS, use_cache=True).cache)
    for sleep in (None, SleepConfig(window_size=L), {"sleep_passes": 3}):
        loaded = AutoModelForSleepLM.from_pretrained(tmp_path, sleep=sleep)
        assert loaded.config.sleep.block_half_lives is None
        assert_same_weights(loaded, model)
        state.to_cache(loaded)
    loaded.save_pretrained(tmp_path / "again", only_sleep=only_sleep)
    assert (
        json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))["sleep"]["block_half_lives"]
        is None
    )


def without(folder: Path, names: set[str]) -> None:
    """Take tensors out of a checkpoint."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    assert names <= weights.keys()
    save_file({k: v for k, v in weights.items() if k not in names}, file, {"format": "pt"})


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", registry.BLOCKS.names())
@pytest.mark.parametrize("only_sleep", [False, True])
def test_missing_blocks_are_made_and_reported(only_sleep, kind, dtype, device_map, bases, tmp_path, dirty_memory):
    model = retrofit(bases("llama"), sleep=SleepConfig(window_size=L, block_kind=kind, **BLOCKS), dtype=dtype)
    for some in (False, True):
        model.save_pretrained(tmp_path, only_sleep=only_sleep)
        blocks = {f"fast_weights.{name}" for name in model.fast_weights.state_dict()}
        missing = blocks
        if some:
            kinds = ("2.mixer.A_log", "2.mixer.q_proj.weight", "2.norm.weight", "2.mixer.o_proj.weight")
            missing = {name for name in blocks if name.endswith((*kinds, "w2.bias"))}
        without(tmp_path, missing)
        with_map = {} if device_map is None else {"device_map": device_map}
        loaded, report = AutoModelForSleepLM.from_pretrained(tmp_path, output_loading_info=True, **with_map)
        assert report["missing_keys"] == missing
        assert not report["unexpected_keys"]
        assert_fresh(loaded, but=frozenset(blocks - missing))
        for name, weight in loaded.state_dict().items():
            assert name in missing or torch.equal(weight, model.get_parameter(name)), name
        if not some:
            assert torch.equal(loaded(IDS[:, :L]).logits, loaded.lm(IDS[:, :L]).logits)


@pytest.mark.parametrize("asleep", [False, True])
@pytest.mark.parametrize(
    ("family", "layer"),
    [("jet_nemotron", "model.layers.0."), ("ouro", "model.layers.1."), ("qwen3_next", "model.layers.0.mlp.")],
)
def test_missing_weights_of_the_base_are_made(family, layer, asleep, tmp_path, dirty_memory):
    model = make_model(family, sleep_config(family, window_size=L)) if asleep else make_base(family)
    model.save_pretrained(tmp_path)
    prefix = f"lm.{layer}" if asleep else layer
    # Whoever looks at a layer's own parameters alone sees a layer that was loaded.
    missing = {
        name
        for name in load_file(tmp_path / "model.safetensors")
        if name.startswith(prefix) and not name.endswith(("A_log", "dt_bias"))
    }
    assert missing
    without(tmp_path, missing)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert len(report["missing_keys"]) > 1
    assert all(p.isfinite().all() for p in loaded.parameters())
    assert loaded(IDS).logits.isfinite().all()
    if family == "jet_nemotron":
        bias = loaded.get_parameter(f"{prefix}self_attn.dynamic_conv1d.kernel_generator.w2.bias")
        assert (bias.view(-1, 4)[:, 3] == 1).all()  # taps of zero would let no gradient through


# Casting.

CASTS = {
    "to": lambda model, dtype: model.to(dtype),
    "to device": lambda model, dtype: model.to("cpu", dtype),
    "named": lambda model, dtype: model.bfloat16() if dtype == torch.bfloat16 else model.half(),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3_next", "qwen3_5", "olmo_hybrid", "jet_nemotron"])
def test_casting_leaves_what_loading_in_that_dtype_leaves(family, dtype, cast, tmp_path):
    model = make_model(family, sleep_config(family, window_size=L))
    model.save_pretrained(tmp_path)
    whole = model.state_dict()
    model = CASTS[cast](copy.deepcopy(model), dtype)
    loaded = SleepForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert_same_weights(model, loaded)
    gates = [name for name in whole if name.endswith(("A_log", "dt_bias"))]
    assert len(gates) == (4 if family == "llama" else 6)
    for name in gates:
        assert torch.equal(model.get_parameter(name), whole[name])
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)


@pytest.mark.parametrize("port", ["JetNemotronModel", "JetNemotronForCausalLM"])
def test_casting_a_port_leaves_what_loading_leaves(port, tmp_path):
    base = make_base("jet_nemotron")
    base.save_pretrained(tmp_path)
    model, loaded = base, type(base).from_pretrained(tmp_path, dtype=torch.bfloat16)
    if port == "JetNemotronModel":
        model, loaded = base.model, type(base.model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same_weights(model.bfloat16(), loaded)
    # RoPE's frequencies are cast as in any stock model.
    loaded.get_decoder().rotary_emb.bfloat16()
    assert torch.equal(model(IDS)[0], loaded(IDS)[0])


def test_gates_are_kept_wherever_blocks_are_cast_and_follow_to_float64():
    model = make_model("llama", sleep_config("llama", block_kind="gated_delta_net"))
    model(IDS, labels=IDS).loss.backward()
    values = {name: p.detach().clone() for name, p in model.fast_weights.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.fast_weights.named_parameters()}
    # As PEFT copies them for modules_to_save.
    for blocks in (copy.deepcopy(model.fast_weights), model.fast_weights):
        blocks.to(torch.bfloat16)
        for name, parameter in blocks.named_parameters():
            gate = name.endswith(("A_log", "dt_bias"))
            assert parameter.dtype == (torch.float32 if gate else torch.bfloat16), name
            if gate:
                assert torch.equal(parameter, values[name])
            if parameter.grad is not None:
                assert parameter.grad.dtype == parameter.dtype
                assert not gate or torch.equal(parameter.grad, gradients[name])
    model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model.to(torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if n.endswith(("A_log", "dt_bias"))} == {torch.float32}
    model.float()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    empty = model.to("meta").to(torch.bfloat16)
    assert empty.fast_weights["0"].mixer.A_log.dtype == torch.float32
    empty.to_empty(device="cpu")
    assert empty.fast_weights["0"].mixer.A_log.device.type == "cpu"


# An only-sleep checkpoint is loaded as a whole one is.

KINDS = pytest.mark.parametrize("only_sleep", [False, True])


@KINDS
def test_the_generation_config_is_the_checkpoints(only_sleep, bases, tmp_path):
    model = retrofit(bases("llama"))
    model.generation_config.eos_token_id, model.generation_config.max_new_tokens = [7, 9], 11
    model.save_pretrained(tmp_path, only_sleep=only_sleep)
    for loader in LOADERS:
        loaded = loader.from_pretrained(tmp_path)
        assert loaded.generation_config.eos_token_id == [7, 9]
        assert loaded.generation_config.max_new_tokens == 11
    other = GenerationConfig(max_new_tokens=5)
    assert AutoModelForSleepLM.from_pretrained(tmp_path, generation_config=other).generation_config.max_new_tokens == 5


ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


@KINDS
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"rope_parameters": ROPE}),
        ("mistral_window", {"sliding_window": 3}),
        ("llama", {"rms_norm_eps": 0.5}),
        ("ouro", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    ],
)
def test_settings_that_the_base_was_loaded_with_are_kept(family, settings, only_sleep, bases, tmp_path):
    plain = retrofit(bases(family))(IDS).logits
    for folder, given in (("at loading", settings), ("afterwards", {})):
        model = retrofit(bases(family), **given)
        if not given:
            for name, value in settings.items():
                setattr(model.lm.config, name, value)
        model.save_pretrained(tmp_path / folder, only_sleep=only_sleep)
        loaded = AutoModelForSleepLM.from_pretrained(tmp_path / folder)
        for name, value in settings.items():
            assert getattr(loaded.lm.config, name) == value
        assert loaded.config.text_config is loaded.lm.config
        if given:
            assert_close(loaded(IDS).logits, model(IDS).logits, 1e-5)
        assert (loaded(IDS).logits - plain).abs().max() > 1e-3


@KINDS
def test_fields_of_the_config_are_keywords(only_sleep, bases, tmp_path):
    model = retrofit(bases("llama"))
    model.config.note = "kept"
    model.save_pretrained(tmp_path, only_sleep=only_sleep)
    for loader in LOADERS:
        loaded = loader.from_pretrained(
            tmp_path, text_config={"rope_parameters": ROPE}, sleep={"sleep_passes": 4}, attn_implementation="eager"
        )
        assert loaded.lm.config.rope_parameters == ROPE
        assert loaded.config.text_config is loaded.lm.config
        assert loaded.config.sleep == dataclasses.replace(model.config.sleep, sleep_passes=4)
        assert loaded.lm.config._attn_implementation == loaded.config._attn_implementation == "eager"
        assert loaded.config.note == "kept"
        assert (loaded(IDS).logits - model(IDS).logits).abs().max() > 1e-3
    config = SleepLMConfig.from_pretrained(tmp_path)
    config.sleep = dataclasses.replace(config.sleep, window_size=4)
    loaded = AutoModelForSleepLM.from_pretrained(tmp_path, config=config, sleep={"sleep_passes": 5})
    assert (loaded.config.sleep.window_size, loaded.config.sleep.sleep_passes) == (4, 5)
    assert config.sleep.sleep_passes == 3  # the caller's is left alone


@KINDS
def test_only_the_checkpoints_own_files_are_read(only_sleep, bases, tmp_path):
    model = retrofit(bases("llama"))
    for shards in ({}, {"max_shard_size": "5KB"}):
        folder = tmp_path / str(len(shards))
        model.save_pretrained(folder, only_sleep=only_sleep, **shards)
        for name in ("old.safetensors", "zzz.safetensors"):
            save_file(
                {k: torch.zeros_like(v) for k, v in model.fast_weights.state_dict(prefix="fast_weights.").items()},
                folder / name,
                {"format": "pt"},
            )
        cache = SleepCache()
        model(IDS, cache=cache)
        SleepState.from_cache(model, cache).save(folder / "memory.safetensors")
        assert_same_weights(AutoModelForSleepLM.from_pretrained(folder), model)


@KINDS
def test_a_variant_is_loaded_by_its_name(only_sleep, bases, tmp_path):
    model = retrofit(bases("llama"))
    model.save_pretrained(tmp_path, only_sleep=only_sleep)
    randomize(model.fast_weights, 8)
    model.save_pretrained(tmp_path, only_sleep=only_sleep, variant="eight")
    model.save_pretrained(tmp_path, only_sleep=only_sleep, variant="shards", max_shard_size="5KB")
    for variant in ("eight", "shards"):
        assert_same_weights(AutoModelForSleepLM.from_pretrained(tmp_path, variant=variant), model)
    with pytest.raises(OSError, match=r"model\.fp16\.safetensors"):
        AutoModelForSleepLM.from_pretrained(tmp_path, variant="fp16")
    with pytest.raises(AssertionError):
        assert_same_weights(AutoModelForSleepLM.from_pretrained(tmp_path), model)


@KINDS
def test_keywords_of_loading_mean_what_they_mean_elsewhere(only_sleep, bases, tmp_path):
    model = retrofit(bases("llama"))
    model.save_pretrained(tmp_path, only_sleep=only_sleep)
    for keywords in (
        {"trust_remote_code": True, "code_revision": None, "revision": "main"},
        {"use_safetensors": True, "weights_only": True, "low_cpu_mem_usage": True, "disable_mmap": True},
        {"ignore_mismatched_sizes": True, "key_mapping": {"^nothing": "else"}, "local_files_only": True},
        {"device_map": {"": "cpu"}},
        {"device_map": {"lm.model": "cpu", "lm.lm_head": "cpu", "fast_weights": "cpu"}},
    ):
        assert_same_weights(AutoModelForSleepLM.from_pretrained(tmp_path, **keywords), model)
    with pytest.raises(OSError, match=r"pytorch_model\.bin"):
        AutoModelForSleepLM.from_pretrained(tmp_path, use_safetensors=False)
    with pytest.raises(ValueError, match="`state_dict` cannot be passed together with a model name"):
        AutoModelForSleepLM.from_pretrained(tmp_path, state_dict={})
    with pytest.raises(TypeError, match="nonsense"):
        AutoModelForSleepLM.from_pretrained(tmp_path, nonsense=1)
    names = (
        list(model.state_dict()) if not only_sleep else [f"fast_weights.{n}" for n in model.fast_weights.state_dict()]
    )
    given = {name: model.state_dict()[name].clone() for name in names}
    config = SleepLMConfig.from_pretrained(tmp_path)
    assert_same_weights(SleepForCausalLM.from_pretrained(None, config=config, state_dict=given), model)
    # Names of another making are mapped, shapes of another are reported.
    file = tmp_path / "model.safetensors"
    weights = {k.replace("fast_weights.", "memory."): v for k, v in load_file(file).items()}
    weights["memory.0.norm.weight"] = torch.ones(3)
    save_file(weights, file, {"format": "pt"})
    keywords = {"key_mapping": {"^memory": "fast_weights"}, "ignore_mismatched_sizes": True}
    loaded, report = AutoModelForSleepLM.from_pretrained(tmp_path, output_loading_info=True, **keywords)
    assert {name for name, *_ in report["mismatched_keys"]} == {"fast_weights.0.norm.weight"}
    assert not report["missing_keys"] | report["unexpected_keys"]
    for name, weight in loaded.state_dict().items():
        fresh = name == "fast_weights.0.norm.weight"
        assert torch.equal(weight, torch.ones(32) if fresh else model.get_parameter(name)), name


def test_a_report_names_what_the_base_lacks_too(bases, tmp_path):
    base = shutil.copytree(bases("llama"), tmp_path / "base")
    retrofit(base).save_pretrained(tmp_path / "new", only_sleep=True)
    without(base, {"model.norm.weight"})
    _, report = AutoModelForSleepLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert report["missing_keys"] == {"lm.model.norm.weight"}
    model, report = AutoModelForSleepLM.from_pretrained(base, output_loading_info=True)
    blocks = {f"fast_weights.{name}" for name in model.fast_weights.state_dict()}
    assert report["missing_keys"] == {"lm.model.norm.weight", "between.gate"} | blocks


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@KINDS
def test_an_adapter_is_loaded_with_its_checkpoint(only_sleep, dtype, beside, bases, tmp_path):
    model = retrofit(bases("llama"))
    model.save_pretrained(tmp_path / "model", only_sleep=only_sleep)
    peft = get_peft_model(
        AutoModelForSleepLM.from_pretrained(tmp_path / "model"),
        LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    randomize(peft.base_model.model, 4)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora" not in name:
                parameter.copy_(model.get_parameter(name.removeprefix("base_model.model.").replace(".base_layer", "")))
    folder = tmp_path / ("model" if beside else "adapter")
    peft.save_pretrained(folder)
    for loader in LOADERS:
        loaded = loader.from_pretrained(folder, dtype=dtype)
        assert type(loaded) is SleepForCausalLM
        assert list(loaded.peft_config) == ["default"]
        lora = {name: p for name, p in loaded.named_parameters() if "lora" in name}
        assert len(lora) == 12
        assert {p.dtype for p in lora.values()} == {getattr(torch, dtype)}
        if dtype == "float32":
            assert torch.equal(loaded(IDS).logits, peft(IDS).logits)
    with pytest.raises(AssertionError):
        assert_close(peft(IDS).logits, model(IDS).logits, 1e-3)


def test_an_adapter_of_a_base_is_refused(bases, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(bases("llama"))
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds an adapter for .*llama-0, which does not sleep. Merge it first"):
        AutoModelForSleepLM.from_pretrained(tmp_path)


# Doors that lead elsewhere.


def test_a_base_is_refused_where_a_sleep_checkpoint_is_asked_for(bases, tmp_path):
    retrofit(bases("llama")).save_pretrained(tmp_path)
    config = SleepLMConfig.from_pretrained(tmp_path)
    message = r"has model_type='llama', so it is no checkpoint of a sleeping model.* use AutoModelForSleepLM"
    for load in (
        lambda: SleepForCausalLM.from_pretrained(bases("llama")),
        lambda: SleepLMConfig.from_pretrained(bases("llama")),
        lambda: SleepForCausalLM.from_pretrained(bases("llama"), config=config),
        lambda: AutoModelForSleepLM.from_pretrained(bases("llama"), config=config),
        lambda: SleepForCausalLM.from_pretrained(tmp_path, config=config.text_config),
        lambda: SleepForCausalLM.from_pretrained(tmp_path, config=bases("llama")),
    ):
        with pytest.raises(ValueError, match=message):
            load()
    assert type(AutoModelForSleepLM.from_pretrained(tmp_path, config=tmp_path)) is SleepForCausalLM


@pytest.mark.parametrize("what", ["base", "whole", "only"])
def test_settings_of_the_sleep_have_their_place(what, bases, tmp_path):
    folder = bases("llama")
    if what != "base":
        folder = tmp_path
        retrofit(bases("llama")).save_pretrained(folder, only_sleep=what == "only")
    for name, value in {"window_size": 64, "eviction": "sliding", "block_kind": "jet"}.items():
        with pytest.raises(TypeError, match=rf"{name} is a setting of the sleep: pass sleep=\{{'{name}': {value!r}\}}"):
            AutoModelForSleepLM.from_pretrained(folder, **{name: value})
    if what != "base":
        with pytest.raises(
            TypeError, match=r"rms_norm_eps is a setting of the base: pass text_config=\{'rms_norm_eps'"
        ):
            AutoModelForSleepLM.from_pretrained(folder, rms_norm_eps=0.1)
        with pytest.raises(
            TypeError, match=r"vocab_size is a setting of the base: pass text_config=\{'vocab_size': 64"
        ):
            AutoModelForSleepLM.from_pretrained(folder, vocab_size=64)


# Round trips.


@pytest.mark.parametrize("shards", [None, "5KB"])
@pytest.mark.parametrize("variant", [None, "v"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3", "olmo_hybrid", "ouro"])
@KINDS
def test_saving_and_loading_again_and_again_changes_nothing(
    only_sleep, family, dtype, variant, shards, bases, tmp_path
):
    saving = {"only_sleep": only_sleep, "variant": variant} | ({"max_shard_size": shards} if shards else {})
    model = retrofit(
        bases(family), dtype=dtype, sleep=sleep_config(family, window_size=L, block_kind="gated_delta_net")
    )
    model.generation_config.max_new_tokens = 7
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "0", **saving)
    for round in range(2):
        model = AutoModelForSleepLM.from_pretrained(tmp_path / str(round), variant=variant)
        assert model.generation_config.max_new_tokens == 7
        assert torch.equal(model(IDS).logits, expected)
        model.save_pretrained(tmp_path / str(round + 1), **saving)
        assert stored(tmp_path / str(round + 1)) == stored(tmp_path / str(round))
        first, second = (
            json.loads((tmp_path / str(n) / "config.json").read_text(encoding="utf-8")) for n in (round, round + 1)
        )
        for config in (first, second):
            config["text_config"].pop("_name_or_path", None)
        assert first == second
    changed = AutoModelForSleepLM.from_pretrained(tmp_path / "2", variant=variant, sleep={"sleep_passes": 3})
    changed.save_pretrained(tmp_path / "3", **saving)
    again = AutoModelForSleepLM.from_pretrained(tmp_path / "3", variant=variant)
    assert again.config.sleep.sleep_passes == 3
    assert_same_weights(again, model)
    assert torch.equal(again(IDS).logits, changed(IDS).logits)
