"""Checkpoints where they meet others: the base's place, the Hub's files, compiled and adapted bases, remote code."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import make_base, randomize, sleep_config, tokens
from helpers import assert_same_weights
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

from hf_sleep import AutoModelForSleepLM, SleepForCausalLM
from hf_sleep.hub import hub_id

# huggingface_hub's own upload to git-LFS, the way it takes without hf_xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SLEEP = sleep_config("llama", window_size=6)
IDS = tokens(15)[None]
LORA = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def folder(tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def retrofit(name, **loading):
    model = AutoModelForSleepLM.from_pretrained(name, sleep=SLEEP, **loading).eval()
    randomize(model.fast_weights, 1)
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# New weights alone, and the base that they need.


def test_new_weights_alone_never_replace_their_base(folder, monkeypatch):
    model, before = retrofit(folder), files(folder)
    monkeypatch.chdir(folder.parent)
    for target in (folder, "base", folder / ".." / "base"):
        with pytest.raises(ValueError, match="would replace the base that is there"):
            model.save_pretrained(target, only_sleep=True)
    assert files(folder) == before
    model.save_pretrained(folder.parent / "blocks", only_sleep=True)
    model.save_pretrained(folder)  # the whole is its own base
    assert_same_weights(AutoModelForSleepLM.from_pretrained(folder), model)
    with pytest.raises(ValueError, match="where their base was, holds a sleep checkpoint"):
        AutoModelForSleepLM.from_pretrained(folder.parent / "blocks")


def test_nor_on_the_hub(hub, folder):
    hub.put("org/tiny", folder)
    model, before = retrofit("org/tiny"), dict(hub.files("org/tiny"))
    with pytest.raises(ValueError, match="would replace the base that is there"):
        model.push_to_hub("org/tiny", only_sleep=True)
    assert hub.files("org/tiny") == before
    model.push_to_hub("org/tiny", only_sleep=True, revision="asleep")
    assert hub.files("org/tiny") == before
    assert_same_weights(AutoModelForSleepLM.from_pretrained("org/tiny", revision="asleep"), model)


def test_the_variant_of_a_base_is_remembered(folder):
    base = make_base("llama")
    base.save_pretrained(folder.parent / "other", variant="fp16")
    model = retrofit(folder.parent / "other", variant="fp16")
    model.save_pretrained(folder.parent / "blocks", only_sleep=True)
    assert_same_weights(AutoModelForSleepLM.from_pretrained(folder.parent / "blocks"), model)


def test_a_base_in_a_folder_is_never_looked_for_on_the_hub(folder, monkeypatch, tmp_path):
    folder.parent.joinpath("models").mkdir()
    folder.rename(folder.parent / "models" / "base")
    monkeypatch.chdir(folder.parent)
    model = retrofit("models/base")
    (tmp_path / "elsewhere").mkdir()
    model.save_pretrained("elsewhere/blocks", only_sleep=True)
    assert_same_weights(AutoModelForSleepLM.from_pretrained("elsewhere/blocks"), model)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert hub_id(model.config.base_model_name_or_path) is None
    model.save_pretrained("again", only_sleep=True)
    assert "huggingface.co/models" not in Path("again/README.md").read_text(encoding="utf-8")
    with pytest.raises(OSError, match="base"):
        AutoModelForSleepLM.from_pretrained("blocks")
    monkeypatch.chdir(tmp_path)
    assert_same_weights(AutoModelForSleepLM.from_pretrained("elsewhere/again"), model)


def test_rounding_to_another_dtype_is_no_learning(folder):
    for dtype in (torch.float16, torch.bfloat16):
        for seed in range(3):
            base = make_base("llama", seed=seed)
            for parameter in base.parameters():
                parameter.data = parameter.data.to(torch.bfloat16).float()
            base.save_pretrained(folder)
            model = retrofit(folder).to(dtype)
            model.save_pretrained(folder.parent / f"{dtype}{seed}", only_sleep=True)
            with torch.no_grad():
                model.lm.model.layers[0].mlp.up_proj.weight[1, 1] += 1
            with pytest.raises(ValueError, match="would lose what the base learned"):
                model.save_pretrained(folder.parent / "changed", only_sleep=True)


# Pushes.


def weights_of(hub):
    return {name for name in hub.files("me/x") if name.endswith((".safetensors", ".index.json"))}


def test_a_push_takes_away_what_it_replaces_alone(hub, folder):
    model = retrofit(folder)
    model.push_to_hub("me/x")
    assert weights_of(hub) == {"model.safetensors"}
    model.push_to_hub("me/x", variant="fp16")
    assert weights_of(hub) == {"model.safetensors", "model.fp16.safetensors"}
    model.push_to_hub("me/x", max_shard_size="40KB")
    assert "model.safetensors" not in weights_of(hub)
    assert {"model.fp16.safetensors", "model.safetensors.index.json"} < weights_of(hub)
    model.push_to_hub("me/x", variant="fp16", max_shard_size="40KB")
    assert "model.fp16.safetensors" not in weights_of(hub)
    model.push_to_hub("me/x")
    model.push_to_hub("me/x", variant="fp16")
    assert weights_of(hub) == {"model.safetensors", "model.fp16.safetensors"}
    for variant in (None, "fp16"):
        assert_same_weights(AutoModelForSleepLM.from_pretrained("me/x", variant=variant), model)


def test_variants_of_another_model_go(hub, folder):
    hub.put("org/tiny", folder)
    model = retrofit("org/tiny")
    model.push_to_hub("me/x", only_sleep=True)
    model.push_to_hub("me/x", variant="fp16")
    assert weights_of(hub) == {"model.fp16.safetensors"}
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForSleepLM.from_pretrained("me/x")
    assert_same_weights(AutoModelForSleepLM.from_pretrained("me/x", variant="fp16"), model)


def test_of_several_processes_the_main_one_pushes(hub, folder, tmp_path):
    model = retrofit(folder)
    for is_main in (True, False):
        how = {"push_to_hub": True, "repo_id": "me/x", "is_main_process": is_main}
        model.save_pretrained(tmp_path / f"rank{is_main}", **how)
        assert weights_of(hub) == {"model.safetensors"}
    assert model.push_to_hub("me/y", is_main_process=False) is None
    with pytest.raises(KeyError):
        hub.files("me/y")


# What is no base as it was loaded.


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own, as it loads
def test_a_compiled_base_is_its_model(folder, tmp_path):
    model = SleepForCausalLM.from_base(torch.compile(LlamaForCausalLM.from_pretrained(folder), backend="eager"), SLEEP)
    model.save_pretrained(tmp_path / "asleep")
    assert_same_weights(SleepForCausalLM.from_pretrained(tmp_path / "asleep"), model)


def test_what_cannot_be_retrofitted_is_named(folder):
    base = LlamaForCausalLM.from_pretrained(folder)
    wrapped = get_peft_model(LlamaForCausalLM.from_pretrained(folder), LoraConfig(**LORA))
    for other, message in (
        (SleepForCausalLM.from_base(base, SLEEP), "which sleeps already"),
        (wrapped, "which stands around a model"),
        (LlamaModel.from_pretrained(folder), "base is a LlamaModel: it must be a causal LM with its head"),
        (LlamaForSequenceClassification.from_pretrained(folder, num_labels=2), "it must be a causal LM with its head"),
        (torch.nn.Linear(2, 2), "base is a Linear"),
        ("org/tiny", "base is a str"),
    ):
        with pytest.raises(ValueError, match=message):
            SleepForCausalLM.from_base(other, SLEEP)
    merged = SleepForCausalLM.from_base(wrapped.merge_and_unload(), SLEEP).eval()
    assert torch.equal(merged(IDS).logits, SleepForCausalLM.from_base(base, SLEEP).eval()(IDS).logits)


def test_an_adapter_in_the_base_is_not_saved_in_the_whole(folder, tmp_path):
    models = [retrofit(folder)]
    get_peft_model(models[0].lm, LoraConfig(**LORA))
    wrapped = get_peft_model(LlamaForCausalLM.from_pretrained(folder), LoraConfig(**LORA))
    models.append(SleepForCausalLM.from_base(wrapped.get_base_model(), SLEEP))
    for model in models:
        with pytest.raises(ValueError, match="the base carries a PEFT adapter"):
            model.save_pretrained(tmp_path / "asleep")


# Loading.


def test_a_whole_checkpoint_is_not_quantised(folder, tmp_path):
    retrofit(folder).save_pretrained(tmp_path / "asleep")
    with pytest.raises(ValueError, match="quantization_config: the checkpoint holds base and new weights in one"):
        AutoModelForSleepLM.from_pretrained(
            tmp_path / "asleep", quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )


def test_the_revision_of_remote_code_is_asked_for(folder, monkeypatch):
    asked = []

    def config(name, **kwargs):
        asked.append(kwargs.get("code_revision"))
        return found(name, **kwargs)

    found = AutoConfig.from_pretrained
    monkeypatch.setattr("hf_sleep.auto.AutoConfig", SimpleNamespace(from_pretrained=config))
    retrofit(folder, trust_remote_code=True, code_revision="audited")
    assert asked == ["audited"]


def test_settings_that_were_written_down_are_read_back(folder):
    for sleep in (dataclasses.asdict(SLEEP), SLEEP.to_dict()):
        assert AutoModelForSleepLM.from_pretrained(folder, sleep=sleep).config.sleep.window_size == SLEEP.window_size


@pytest.mark.parametrize("sleep", ["hard", 4, {"window": 8}], ids=str)
def test_settings_that_are_none_are_named_before_anything_is_loaded(sleep, folder, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match=r"sleep=.*must be a SleepConfig|sleep has 'window', which is no setting"):
        AutoModelForSleepLM.from_pretrained(folder, sleep=sleep)
