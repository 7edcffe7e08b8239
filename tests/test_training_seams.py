"""Where training meets others: names of published weights, schedulers, stages, adapters, what is asked too late."""

import logging

import pytest
import torch
from families import make_model, sleep_config, tokens
from helpers import QUIET, weights
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from hf_sleep import sleep_lora_config
from hf_sleep.compat import CHECKPOINTING
from hf_sleep.data.rule110 import Rule110
from hf_sleep.training import (
    GenerationEvaluation,
    HardEvictionWarmup,
    SleepCollator,
    SleepTrainer,
    SleepTrainingArguments,
    SpikeGuard,
    Teacher,
    freeze_all_but_fast_weights,
)

TASK = Rule110(width=6, steps=1, num_strings=2)


def trainer_of(path, model, plain=False, rows=None, eval_dataset=None, callbacks=None, **fields):
    kind, arguments = (Trainer, TrainingArguments) if plain else (SleepTrainer, SleepTrainingArguments)
    settings = QUIET | {"max_steps": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant"} | fields
    rows = TASK.dataset(32) if rows is None else rows
    how = {"train_dataset": rows, "eval_dataset": eval_dataset, "callbacks": callbacks}
    return kind(model, arguments(path, **settings), SleepCollator(), **how)


def model_of(family, **fields):
    return make_model(family, sleep_config(family, **fields))


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a | b)


# Families whose published weights have other names, or are cut otherwise, than the model's.

RENAMED = ["qwen3_moe", "qwen3_next", "olmo_hybrid", "kimi_linear"]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", RENAMED)
def test_a_resumed_run_has_all_weights(family, sharded, tmp_path, monkeypatch):
    if sharded:
        save = type(model_of(family)).save_pretrained
        small = lambda self, folder, **how: save(self, folder, **how | {"max_shard_size": "40KB"})  # noqa: E731
        monkeypatch.setattr(type(model_of(family)), "save_pretrained", small)
    how = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(tmp_path, model_of(family), **how)
    whole.train()
    again = trainer_of(tmp_path, model_of(family), **how)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (len(list((tmp_path / "checkpoint-2").glob("*.safetensors"))) > 1) == sharded
    assert same(weights(whole.model), weights(again.model))


@pytest.mark.parametrize("family", ["qwen3_moe", "olmo_hybrid"])
def test_the_best_model_is_the_checkpoint_s(family, tmp_path):
    class Notes(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_second"] = float(state.global_step == 2)

        def on_save(self, args, state, control, model=None, **kwargs):
            noted[state.global_step] = weights(model)

    noted = {}
    model = model_of(family)
    if family == "olmo_hybrid":
        freeze_all_but_fast_weights(model)
    how = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "second", "greater_is_better": True}
    trainer = trainer_of(tmp_path, model, eval_dataset=TASK.dataset(8, split="test"), callbacks=[Notes()], **how | best)
    trainer.train()
    assert same(weights(model), noted[2])
    assert not same(noted[4], noted[2])


def test_the_plain_trainer_loses_no_weights_in_silence(tmp_path):
    how = {"save_strategy": "steps", "save_steps": 2, "plain": True}
    trainer_of(tmp_path, model_of("qwen3_moe"), **how).train()
    with pytest.raises(ValueError, match=r"have names that this model has not .*from_pretrained.*use SleepTrainer"):
        trainer_of(tmp_path, model_of("qwen3_moe"), **how).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# Optimizers and schedules.


@pytest.mark.parametrize("muon", [1e-3, None])
@pytest.mark.parametrize("kind", ["polynomial", "cosine_with_min_lr", "cosine_warmup_with_min_lr"])
def test_schedules_that_ask_the_optimizer_for_its_rate(kind, muon, tmp_path):
    given = {} if kind == "polynomial" else {"min_lr": 1e-4}
    how = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": given, "muon_learning_rate": muon, "logging_steps": 1}
    trainer = trainer_of(tmp_path, model_of("llama"), **how)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert min(rates) < max(rates) <= 1e-2


def test_the_median_begins_anew_where_more_is_trained(tmp_path):
    """The whole model's gradient is many times that of the fast weights alone, and no spike."""
    model = model_of("llama", between="none")
    large = 1000.0
    model.lm.model.layers[1].mlp.up_proj.weight.register_hook(lambda gradient: gradient * large)
    trainer = trainer_of(tmp_path, model, max_steps=12, callbacks=[HardEvictionWarmup(steps=4)], max_grad_norm=1.0)
    guard = SpikeGuard(trainer, window=3, max_skips=3)
    trainer.add_callback(guard)
    before = weights(model)
    trainer.train()
    assert guard._kept["skipped"] == 0
    assert not torch.equal(before["lm.model.norm.weight"], weights(model)["lm.model.norm.weight"])
    assert [len(norms) for norms in guard._norms.values()] == [3, 3]


# Adapters.


def test_a_checkpoint_of_a_model_with_more_and_wider_tensors_is_read_whole(tmp_path):
    """A base in bfloat16 with blocks in float32, and a module that somebody added."""
    for family in ("llama", "qwen3_moe"):
        made = []
        for _ in range(2):
            model = make_model(family, sleep_config(family), torch.bfloat16)
            model.lm.requires_grad_(False)
            model.fast_weights.float()
            model.probe = torch.nn.Linear(3, 1)
            made.append(model)
        folder = tmp_path / family
        for block in made[0].fast_weights.parameters():
            block.data += torch.randn_like(block) / 100
        made[0].save_pretrained(folder)
        trainer = trainer_of(folder, made[1])
        trainer._load_from_checkpoint(str(folder))
        assert same(weights(made[0]), weights(made[1]))


def test_other_metrics_may_do_without_labels(tmp_path):
    rows = [{"input_ids": tokens(9).tolist(), "difficulty": 1}] * 4
    how = {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 2}
    trainer = trainer_of(tmp_path, model_of("llama"), eval_dataset=rows, **how)
    trainer.compute_metrics = lambda prediction: {}
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("how", ["pissa", "olora", "kasa"])
def test_a_teacher_is_refused_where_an_adapter_has_changed_the_base(how):
    model = model_of("llama")
    given, said = {"init_lora_weights": how}, f"init_lora_weights='{how}'"
    if how == "kasa":
        given, said = {"kasa_config": pytest.importorskip("peft").tuners.lora.config.KasaConfig()}, "kasa_config"
    with pytest.raises(ValueError, match=f"{said} changes the base's own weights"):
        Teacher(get_peft_model(model, sleep_lora_config(model, **given)))
    other = model_of("llama")
    Teacher(get_peft_model(other, sleep_lora_config(other, init_lora_weights="Gaussian")))


def test_an_adapter_that_tokens_switch_on_is_refused(tmp_path):
    fields = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "alora_invocation_tokens": [3, 4]}
    model = get_peft_model(model_of("llama"), LoraConfig(**fields))
    with pytest.raises(TypeError, match=r"alora_invocation_tokens=\[3, 4\]"):
        trainer_of(tmp_path, model)


# What would be said too late, or not at all.


def test_early_stopping_sees_what_generation_reports(tmp_path):
    rows = TASK.dataset(4, split="test")
    how = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    metric = {"metric_for_best_model": "generate_accuracy_passes_2", "load_best_model_at_end": True}
    stops = EarlyStoppingCallback(early_stopping_patience=1)
    model = model_of("llama")
    model.requires_grad_(False)
    next(iter(model.fast_weights.parameters())).requires_grad_(True)
    fields = {"learning_rate": 1e-12, "muon_learning_rate": None}
    trainer = trainer_of(tmp_path, model, eval_dataset=rows, callbacks=[stops], **how | metric | fields)
    short = [row | {"prompt_ids": row["input_ids"][:9]} for row in rows]
    trainer.add_callback(GenerationEvaluation(trainer, short, sleep_passes=(2,)))
    trainer.train()
    assert trainer.state.global_step == 2


def test_rows_in_which_nothing_sleeps_are_told(tmp_path, caplog):
    row = {"input_ids": tokens(8).tolist(), "labels": tokens(8).tolist()}
    for rows, size, is_told in (
        ([row] * 8, 8, True),
        ([row] * 8, 7, False),
        ([row | {"sleep_after": [0] * 3 + [1] + [0] * 4}] * 8, 8, False),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "hf_sleep.training.rows"):
            trainer_of(tmp_path, model_of("llama", window_size=size), rows=rows, max_steps=1).train()
        said = [record.getMessage() for record in caplog.records if "does not sleep in them" in record.getMessage()]
        assert bool(said) == is_told
        assert all("window_size=8, at most 8 tokens" in each for each in said)


def test_rows_that_cannot_be_judged_are_refused_before_the_first_step(tmp_path):
    rows = [{"input_ids": tokens(9).tolist(), "difficulty": 1}] * 4
    trainer = trainer_of(tmp_path, model_of("llama"), eval_dataset=rows, eval_strategy="steps", eval_steps=2)
    with pytest.raises(ValueError, match="have a difficulty but no labels"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_what_liger_adds_to_a_call_says_nothing():
    model, ids = model_of("llama").eval(), tokens(9)[None]
    assert torch.equal(model(ids, skip_logits=True).logits, model(ids).logits)


@pytest.mark.parametrize("how", [{"every_n_layers": 2}, {"offload": True}], ids=str)
def test_checkpointing_layer_by_layer_is_refused(how):
    model = model_of("llama")
    enable = getattr(model, f"{CHECKPOINTING}_enable")
    enable({"use_reentrant": False})
    with pytest.raises(ValueError, match=f"{next(iter(how))}=.*recomputes whole windows"):
        enable(**how)
