"""LoRA on the base, the fast-weight blocks trained in full: learns, is saved, loaded, merged, and sleeps all along."""

from types import SimpleNamespace

import peft
import pytest
import torch
import transformers.integrations.peft
from families import FAMILIES, make_base, make_model, randomize, sleep_config, tokens
from helpers import QUIET, assert_close, assert_same_weights, word_tokenizer, words
from packaging.version import Version
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from hf_sleep import AutoModelForSleepLM, SleepCache, SleepForCausalLM, SleepSession, SleepState, sleep_lora_config
from hf_sleep.compat import CHECKPOINTING
from hf_sleep.state import fingerprint
from hf_sleep.training import GenerationEvaluation, SleepMonitor, SleepTrainer, SleepTrainingArguments

L = 6
IDS = tokens(3 * L + 2)[None]
# The loss of this random base is rough: after eight steps it is 0.88 to 0.96 of the first, as the processor rounds.
STEPS = {"qwen3_next": 40}
PROJECTIONS = r"lm\..*_proj"
# What carries fast weights besides the injected blocks.
OWN_LAYERS = {
    "llama": [],
    "ouro": [],
    "qwen3_next": ["linear_attn"],
    "jet_nemotron": ["layers.0.self_attn", "layers.2.self_attn"],
}


def settings(family: str, **fields):
    return sleep_config(family, window_size=L, sleep_passes=3, **fields)


def lora(model, own: list[str], **fields) -> LoraConfig:
    """Configure LoRA as docs/peft.md does."""
    blocks = [f"fast_weights.{i}" for i in model.fast_weights]
    fields = {"r": 4, "target_modules": PROJECTIONS, "modules_to_save": blocks + own, "task_type": "CAUSAL_LM"} | fields
    return LoraConfig(**fields)


def steps(model, count: int) -> list[float]:
    """Losses of `count` optimizer steps on one text."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(count):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def generate(model) -> torch.Tensor:
    """Sleeps on the way, in the prompt and among the new tokens."""
    return model.generate(input_ids=IDS, max_new_tokens=2 * L, do_sample=False, pad_token_id=0)


@pytest.fixture(scope="module", params=OWN_LAYERS)
def tuned(request, tmp_path_factory):
    """A retrofit of a base in a folder, fine-tuned, and its adapter in another."""
    torch.manual_seed(0)
    family, own = request.param, OWN_LAYERS[request.param]
    folder = tmp_path_factory.mktemp(family)
    make_base(family).save_pretrained(folder / "base")

    def retrofit(seed: int) -> SleepForCausalLM:
        torch.manual_seed(seed)
        model = AutoModelForSleepLM.from_pretrained(folder / "base", sleep=settings(family))
        for block in model.fast_weights.values():
            block.init_weights(0.02)
        return model

    before = retrofit(1)
    expected = before(IDS).logits
    before.save_pretrained(folder / "retrofit", only_sleep=True)
    model = get_peft_model(AutoModelForSleepLM.from_pretrained(folder / "retrofit"), lora(before, own))
    start = model.eval()(input_ids=IDS).logits
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = steps(model.train(), STEPS.get(family, 8))
    model.eval().save_pretrained(folder / "adapter")
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    return SimpleNamespace(
        folder=folder,
        own=own,
        retrofit=retrofit,
        before=before,
        expected=expected,
        start=start,
        model=model,
        frozen=frozen,
        losses=losses,
        logits=logits,
    )


def test_an_adapter_starts_as_the_retrofit_and_learns(tuned):
    assert torch.equal(tuned.start, tuned.expected)
    assert tuned.losses[-1] < 0.9 * tuned.losses[0]


def test_just_the_adapter_and_the_fast_weights_learn(tuned):
    tuned.model.train()(input_ids=IDS, labels=IDS).loss.backward()
    own = tuple(f"{name}.modules_to_save." for name in tuned.own)
    for name, parameter in tuned.model.named_parameters():
        in_full = "fast_weights." in name or any(part in name for part in own)
        in_full = in_full and "original_module" not in name
        assert parameter.requires_grad is (in_full or ".lora_" in name), name
        assert "lora_" not in name or "fast_weights" not in name
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
            assert torch.equal(parameter, tuned.frozen[name]), name
    tuned.model.zero_grad()
    tuned.model.eval()


def test_an_adapter_loads_onto_a_fresh_retrofit(tuned):
    """The retrofit has the same base and settings; what its new blocks were initialised with does not matter."""
    fresh = tuned.retrofit(2)
    loaded = PeftModel.from_pretrained(fresh, tuned.folder / "adapter").eval()
    assert torch.equal(loaded(input_ids=IDS).logits, tuned.logits)
    assert torch.equal(generate(loaded), generate(tuned.model))


def test_an_adapter_finds_the_retrofit_that_it_was_made_for(tuned):
    loaded = AutoPeftModelForCausalLM.from_pretrained(tuned.folder / "adapter").eval()
    assert type(loaded.get_base_model()) is SleepForCausalLM
    assert loaded.get_base_model().config.sleep == tuned.before.config.sleep
    assert torch.equal(loaded(input_ids=IDS).logits, tuned.logits)


def test_an_adapter_can_be_switched_off(tuned):
    with tuned.model.disable_adapter():
        assert torch.equal(tuned.model(input_ids=IDS).logits, tuned.expected)
    assert torch.equal(tuned.model(input_ids=IDS).logits, tuned.logits)


def test_a_merged_model_is_an_ordinary_sleep_checkpoint(tuned, tmp_path):
    adapted = PeftModel.from_pretrained(tuned.retrofit(2), tuned.folder / "adapter").eval()
    blocks = {name: t.clone() for name, t in adapted.state_dict().items() if "modules_to_save" in name}
    said = generate(adapted)
    merged = adapted.merge_and_unload()
    assert type(merged) is SleepForCausalLM
    assert_close(merged(IDS).logits, tuned.logits, 1e-4)
    assert torch.equal(generate(merged), said)
    for name, tensor in blocks.items():
        plain = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        assert torch.equal(merged.state_dict()[plain], tensor), name
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForSleepLM.from_pretrained(tmp_path)
    assert_same_weights(loaded, merged)
    assert merged.state_dict().keys() == tuned.before.state_dict().keys()
    assert torch.equal(loaded(IDS).logits, merged(IDS).logits)
    with pytest.raises(ValueError, match="lose what the base learned"):
        merged.save_pretrained(tmp_path / "blocks", only_sleep=True)


def test_memory_is_carried_and_resumed_through_an_adapter(tuned, tmp_path):
    model = tuned.model.get_base_model()
    cache, whole = SleepCache(), SleepCache()
    with torch.no_grad():
        expected = model(IDS, cache=whole).logits
        model(IDS[:, : L + 2], cache=cache)
        SleepState.from_cache(model, cache).save(tmp_path / "state.safetensors")
        state = SleepState.load(tmp_path / "state.safetensors")
        rest = model(IDS[:, L + 2 :], cache=state.to_cache(model)).logits
        assert_close(rest, expected[:, L + 2 :], 1e-5)
        asleep = model.sleep(cache)
    assert asleep.memory.counters[0].fill == 0
    with pytest.raises(ValueError, match="saved by another model"):
        state.to_cache(tuned.before)


# One family stands for all from here on.


def fresh(family: str = "llama", dtype: torch.dtype = torch.float32, trained: bool = True, **fields):
    return make_model(family, settings(family, **fields), dtype, trained=trained)


def test_an_adapter_with_untrained_blocks_still_warns(monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_sleep.modeling.advice.logger.warning_once", warnings.append)
    for trained in (True, False):
        model = get_peft_model(fresh(trained=trained), lora(fresh(), [])).eval()
        model(input_ids=IDS)
        assert [block.is_untrained for block in model.get_base_model().fast_weights.values()] == [not trained] * 2
        assert len(warnings) is int(not trained)


STUCK = "The fast-weight blocks 0, 2 cannot learn"


@pytest.mark.parametrize(
    ("fields", "warned"),
    [
        ({"target_modules": ["q_proj", "v_proj"], "modules_to_save": None}, True),  # of the blocks too
        ({"modules_to_save": None}, True),
        ({"target_modules": ["q_proj", "o_proj"], "modules_to_save": None}, False),  # an adapter at the zero moves it
        ({"target_modules": ["q_proj"], "modules_to_save": ["mixer"]}, False),
        ({}, False),
    ],
)
def test_training_warns_once_of_blocks_that_cannot_learn(fields, warned, monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_sleep.modeling.advice.logger.warning_once", warnings.append)
    model = get_peft_model(fresh(trained=False), lora(fresh(), [], **fields)).train()
    model(input_ids=IDS[:, :L], labels=IDS[:, :L])
    assert not warnings  # it has not slept
    steps(model, 3)
    assert [STUCK in warning for warning in warnings] == [True] * warned
    model(input_ids=IDS, labels=IDS).loss.backward()
    blocks = [p.grad for name, p in model.named_parameters() if "fast_weights" in name and p.grad is not None]
    assert any(gradient.any() for gradient in blocks) is not warned


def test_blocks_that_are_frozen_and_add_something_are_no_mistake(monkeypatch):
    """Nor is a model of which nothing is trained, nor one that is not being trained."""
    warnings = []
    monkeypatch.setattr("hf_sleep.modeling.advice.logger.warning_once", warnings.append)
    only_base = lora(fresh(), [], modules_to_save=None)
    steps(get_peft_model(fresh(trained=True), only_base).train(), 1)
    fresh(trained=False).requires_grad_(False).train()(IDS)
    with torch.no_grad():
        get_peft_model(fresh(trained=False), only_base).train()(input_ids=IDS)
    assert not warnings
    one = fresh(trained=True).train()
    one.fast_weights["2"].mixer.o_proj.requires_grad_(False).weight.zero_()
    steps(one, 2)
    assert len(warnings) == 1
    assert "The fast-weight blocks 2 cannot learn" in warnings[0]


# Where they are fused, or those of the MLP are experts' parameters of three dimensions.
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
OF_FAMILY = dict.fromkeys(("qwen3_moe", "mixtral", "gpt_oss"), ATTENTION) | {
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "glm4": ATTENTION | {"gate_up_proj", "down_proj"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lora_config_trains_blocks_in_full_and_every_projection_of_the_base(family):
    torch.manual_seed(0)
    model = fresh(family)
    blocks = {name for name, _ in model.named_parameters() if name.startswith("fast_weights.")}
    fields = {"lora_dropout": 0.0, "init_lora_weights": False, "ensure_weight_tying": model.config.tie_word_embeddings}
    config = sleep_lora_config(model, r=2, modules_to_save=["embed_tokens"], **fields)
    assert (config.r, config.lora_alpha) == (2, 4)
    model = get_peft_model(model, config).train()
    steps(model, 1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    in_full = {name.removeprefix("base_model.model.").replace("modules_to_save.default.", "") for name in learns}
    assert blocks < in_full
    assert any("embed_tokens" in name for name in in_full)
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in learns if ".lora_" in name}
    mlp = {"input_linear", "output_linear"} if family == "granitemoehybrid" else {"gate_proj", "up_proj", "down_proj"}
    assert OF_FAMILY.get(family, ATTENTION | mlp) <= adapted
    assert all("_proj" in name for name in adapted - mlp)
    names = ("linear_attn", "mamba")
    linear = [(name, p) for name, p in model.get_base_model().lm.named_modules() if name.endswith(names)]
    for name, mixer in linear:
        inputs = {child for child, module in mixer.named_modules() if "proj" in child and "." not in child}
        assert inputs <= adapted, name
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_the_lora_config_is_for_a_sleeping_model():
    with pytest.raises(TypeError, match="needs a SleepForCausalLM before PEFT wraps it, not LlamaForCausalLM"):
        sleep_lora_config(make_base("llama"))


def test_checkpointing_is_invisible_to_an_adapter():
    torch.manual_seed(0)
    model = get_peft_model(fresh(), lora(fresh(), [], init_lora_weights=False)).train()
    results = []
    for checkpointing in (False, True):
        model.get_base_model().gradient_checkpointing = checkpointing
        model.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}))
    (loss, gradients), (other_loss, other_gradients) = results
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(gradient, other_gradients[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_trains_and_saves_an_adapter(checkpointing, tmp_path):
    model = get_peft_model(fresh(), lora(fresh(), []))
    args = TrainingArguments(
        output_dir=tmp_path,
        max_steps=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
        **{CHECKPOINTING: checkpointing},
    )
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    assert model.get_base_model().gradient_checkpointing is checkpointing
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1] < losses[0]
    expected = model.eval()(input_ids=IDS).logits
    for folder in (tmp_path / "checkpoint-2", tmp_path / "saved"):
        if folder.name == "saved":
            trainer.save_model(folder)
        loaded = PeftModel.from_pretrained(fresh(), folder).eval()
        assert torch.equal(loaded(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("family", ["llama", "jet_nemotron"])
def test_in_half_precision_the_gates_stay_whole(family, tmp_path):
    def load() -> SleepForCausalLM:
        return AutoModelForSleepLM.from_pretrained(tmp_path / "retrofit", dtype="bfloat16")

    fresh(family).save_pretrained(tmp_path / "retrofit")
    model = get_peft_model(load(), lora(fresh(family), OWN_LAYERS[family]))
    losses = steps(model.train(), 4)
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        whole = name.endswith(("A_log", "dt_bias")) or "lora_" in name
        assert parameter.dtype == (torch.float32 if whole else torch.bfloat16), name
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_all_linear_leaves_alone_what_is_trained_in_full():
    model = get_peft_model(fresh(), lora(fresh(), [], target_modules="all-linear"))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert len(adapted) == 4 * 7
    assert all(".lm.model.layers." in name for name in adapted)


def test_the_blocks_are_named_one_by_one():
    """PEFT has no form for all of them at once."""
    with pytest.raises(TypeError, match=r"cannot be applied to modules of type .*ModuleDict"):
        get_peft_model(fresh(), lora(fresh(), [], modules_to_save=["fast_weights"]))


def test_new_tokens_of_a_tied_base_are_learnt_at_both_ends(tmp_path):
    """The rows that are trained are the head's too: before the merge, in the saved adapter, and after it."""
    model = fresh("qwen3")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    before = model(IDS).logits
    adapted = get_peft_model(model, sleep_lora_config(model, r=2, trainable_token_indices={"embed_tokens": [5, 6]}))
    ids = torch.cat([IDS, torch.tensor([[5, 6]])], 1)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 1e-3)
    adapted(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    expected = adapted.eval()(input_ids=ids).logits.detach()
    assert (expected[:, : IDS.shape[1]] - before).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh("qwen3"), tmp_path)
    assert_close(loaded(input_ids=ids).logits, expected, 1e-5)
    merged = adapted.merge_and_unload()
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert_close(merged(ids).logits, expected, 1e-5)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_tied_embeddings_stay_tied_where_peft_is_asked_for_it(family, recwarn):
    model = fresh(family)
    config = sleep_lora_config(model, r=2, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    adapted = get_peft_model(model, config)
    untied = [str(warning.message) for warning in recwarn if "no tied modules were found" in str(warning.message)]
    assert bool(untied) == (family == "llama")
    merged = adapted.merge_and_unload()
    tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert tied == (family == "qwen3")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("size", [None, 70])
def test_resized_embeddings_go_with_the_adapter(size, tmp_path):
    def resized():
        model = AutoModelForSleepLM.from_pretrained(tmp_path / "retrofit")
        if size is not None:
            model.resize_token_embeddings(size)
        return model

    fresh().save_pretrained(tmp_path / "retrofit")
    model = resized()
    adapted = get_peft_model(model, sleep_lora_config(model, r=2, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in saved) == (2 if size else 0)
    loaded = PeftModel.from_pretrained(resized(), tmp_path / "adapter").eval()
    assert torch.equal(loaded(input_ids=IDS).logits, adapted(input_ids=IDS).logits)


def test_a_model_that_carries_adapters_is_not_saved_as_a_checkpoint(tmp_path):
    model = fresh()
    adapted = get_peft_model(model, lora(model, []))
    with pytest.raises(ValueError, match=r"carries PEFT adapters: call save_pretrained of the PeftModel"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    adapted.unload().save_pretrained(tmp_path / "model")
    assert_same_weights(SleepForCausalLM.from_pretrained(tmp_path / "model"), fresh())


NEEDS_PEFT = Version(transformers.integrations.peft.MIN_PEFT_VERSION)
HAS_PEFT = Version(peft.__version__)


def test_an_adapter_that_transformers_adds_is_saved_and_loaded(tmp_path):
    if HAS_PEFT < NEEDS_PEFT:  # which may not be published yet: then it is transformers that says so
        with pytest.raises(ValueError, match=rf"please use a version >= {NEEDS_PEFT}"):
            fresh().add_adapter(lora(fresh(), []))
        return
    torch.manual_seed(0)
    model = fresh()
    model.add_adapter(lora(model, [], init_lora_weights=False))
    randomize(model.fast_weights, 3)
    model.eval().save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    loaded = fresh()
    expected = loaded(IDS).logits
    loaded.load_adapter(tmp_path)
    assert torch.equal(loaded.eval()(IDS).logits, model(IDS).logits)
    assert not torch.equal(loaded(IDS).logits, expected)


# Quantised bases. bitsandbytes is not among the tests' requirements: docs/peft.md says what was run with it.


@pytest.mark.parametrize("bits", [4, 8])
def test_peft_is_told_how_the_base_is_quantised(bits):
    base = make_base("llama")
    setattr(base, f"is_loaded_in_{bits}bit", True)
    base.quantization_method = "bitsandbytes"
    model = SleepForCausalLM.from_base(base, settings("llama"))
    assert getattr(model, f"is_loaded_in_{bits}bit")
    assert not hasattr(model, f"is_loaded_in_{12 - bits}bit")
    assert model.quantization_method == "bitsandbytes"
    assert not hasattr(fresh(), "quantization_method")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_a_model_is_prepared_for_training_on_a_quantised_base():
    base = make_base("llama", torch.bfloat16)
    base.is_loaded_in_4bit = True
    model = SleepForCausalLM.from_base(base, settings("llama"))
    model = prepare_model_for_kbit_training(model)
    assert model.gradient_checkpointing
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in model.parameters())
    adapted = get_peft_model(model, lora(model, []))
    assert all("lora_" in n or "modules_to_save" in n for n, p in adapted.named_parameters() if p.requires_grad)
    losses = steps(adapted.train(), 4)
    assert losses[-1] < losses[0]


def test_a_state_is_taken_from_and_given_to_the_wrapper_or_what_it_wraps(tmp_path):
    inner = make_model("llama", settings("llama"))
    tuned = get_peft_model(inner, lora(inner, [], init_lora_weights=False)).eval()
    cache, ids = SleepCache(), torch.arange(2 * L + 3)[None]
    with torch.no_grad():
        tuned(input_ids=ids[:, :-1], cache=cache)
        expected = tuned(input_ids=ids[:, -1:], cache=cache.fork()).logits
    assert cache.belongs_to(tuned)
    assert cache.belongs_to(inner)
    SleepState.from_cache(tuned, cache).save(tmp_path / "a.sleep")
    assert SleepState.from_cache(inner, cache).fingerprint == SleepState.load(tmp_path / "a.sleep").fingerprint
    for model in (tuned, inner):
        again = SleepState.load(tmp_path / "a.sleep").to_cache(model)
        with torch.no_grad():
            assert torch.equal(tuned(input_ids=ids[:, -1:], cache=again).logits, expected)
    with tuned.disable_adapter(), pytest.raises(ValueError, match="saved by another model"):
        SleepState.load(tmp_path / "a.sleep").to_cache(tuned)


def test_a_memory_is_one_of_the_adapter_that_read_it(tmp_path):
    """Which of them compute is no parameter, and makes another model all the same."""
    model = make_model("llama", settings("llama"))
    config = LoraConfig(r=2, target_modules=PROJECTIONS, task_type="CAUSAL_LM", init_lora_weights=False)
    tuned = get_peft_model(model, config)
    tuned.add_adapter("other", config)
    inner = tuned.get_base_model()
    found = {"default": fingerprint(inner)}
    tuned.set_adapter("other")
    found["other"] = fingerprint(inner)
    with tuned.disable_adapter():
        found["none"] = fingerprint(inner)
    assert len(set(found.values())) == 3
    tuned.set_adapter("default")
    assert fingerprint(inner) == found["default"]
    session = SleepSession(tuned.eval(), word_tokenizer())
    session.read(words(2 * L))
    session.save(tmp_path / "a.sleep")
    assert SleepSession.load(tmp_path / "a.sleep", tuned, word_tokenizer()).report() == session.report()
    tuned.set_adapter("other")
    with pytest.raises(ValueError, match="saved by another model"):
        SleepSession.load(tmp_path / "a.sleep", tuned, word_tokenizer())


def test_a_base_that_carries_an_adapter_is_wrapped_as_it_is():
    model = make_model("llama", settings("llama"))
    adapted = get_peft_model(model, lora(model, [], init_lora_weights=False)).eval()
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    wrapped = SleepForCausalLM.from_base(model.lm, settings("llama")).eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())
    ids = tokens(L)[None]
    assert torch.equal(wrapped(ids).logits, model.lm(ids).logits)


def test_a_learnt_prompt_is_refused(tmp_path):
    """It would be read before every window, and its columns shift every label."""
    model = get_peft_model(fresh(trained=True), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(TypeError, match="model has a PromptTuningConfig, whose prompt is not in the model's layers"):
        SleepTrainer(model, SleepTrainingArguments(tmp_path, **QUIET))
    trainer = Trainer(model, TrainingArguments(tmp_path, **QUIET))
    for callback in (SleepMonitor, lambda trainer: GenerationEvaluation(trainer, [], (1,))):
        with pytest.raises(TypeError, match="PromptTuningConfig"):
            callback(trainer)
