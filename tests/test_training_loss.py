"""Loss as both Trainers divide, shift and smooth it: the plain base's, wherever the pads stand."""

import copy

import pytest
import torch
from families import make_base, make_model, sleep_config, tokens
from helpers import QUIET
from peft import get_peft_model
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments

from hf_sleep import SleepForCausalLM, sleep_lora_config
from hf_sleep.training import SleepCollator, SleepTrainer, SleepTrainingArguments

SETTINGS = QUIET | {
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "weight_decay": 0.0,
}
LENGTHS = (5, 30, 17, 9, 12, 4, 26, 8)
ROWS = [{"input_ids": tokens(n, seed=n).tolist()} for n in LENGTHS]


def tiny(**fields):
    return make_model("llama", sleep_config("llama", sleep_passes=2, **fields), torch.float64)


def trainer_of(kind, path, model, collator=None, **fields):
    own = {"muon_learning_rate": None, "adam_beta2": 0.999} if kind is SleepTrainer else {}
    arguments = (SleepTrainingArguments if kind is SleepTrainer else TrainingArguments)(path, **SETTINGS | own | fields)
    return kind(model, arguments, collator or SleepCollator(), train_dataset=ROWS)


def labelled(side):
    """Label as DataCollatorForLanguageModeling does: every real token has a label, a row's first too."""

    def collate(rows):
        batch = SleepCollator(side)([{"input_ids": row["input_ids"]} for row in rows])
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    return collate


# Label smoothing.


def smoothed(logits, ids, epsilon):
    """Smooth the loss of `[B, T, vocab]` for `[B, T]`, without pads: of what each token says of the next."""
    log_p = logits.log_softmax(-1)[:, :-1]
    nll = -log_p.gather(-1, ids[:, 1:, None]).mean()
    return ((1 - epsilon) * nll - epsilon * log_p.mean()).item()


def wrapped(model):
    return get_peft_model(model, sleep_lora_config(model, r=2)) if isinstance(model, SleepForCausalLM) else model


@pytest.mark.parametrize("kind", [Trainer, SleepTrainer])
@pytest.mark.parametrize("made", ["llama", "jet_nemotron", "ouro", "asleep", "adapter"])
def test_label_smoothing_is_of_the_next_token(kind, made, tmp_path):
    model = tiny() if made in ("asleep", "adapter") else make_base(made, torch.float64)
    model = wrapped(model) if made == "adapter" else model
    ids = torch.stack([tokens(21, seed=i) for i in (1, 2)])
    expected = smoothed(model(input_ids=ids).logits, ids, 0.1)
    trainer = trainer_of(kind, tmp_path, model, label_smoothing_factor=0.1)
    for given in ({}, {"num_items_in_batch": torch.tensor(40)}):
        loss = trainer.compute_loss(model.train(), {"input_ids": ids, "labels": ids}, **given)
        assert loss.item() == pytest.approx(expected, abs=1e-6)  # it smooths in float32


def test_the_trainer_knows_a_sharded_model_by_its_name():
    sharded = type("FSDPSleepForCausalLM", (FSDPModule, SleepForCausalLM), {})
    model = tiny()
    model.__class__ = sharded
    assert model._get_name() == tiny()._get_name() == "SleepForCausalLM"


@pytest.mark.parametrize("side", ["left", "right"])
def test_label_smoothing_through_the_sleep_trainer_ignores_what_nothing_predicts(side, tmp_path):
    model, losses = tiny(), []
    for collator in (labelled(side), SleepCollator("right")):
        trainer = trainer_of(SleepTrainer, tmp_path, copy.deepcopy(model), collator, label_smoothing_factor=0.1)
        if isinstance(collator, SleepCollator):
            trainer.train_dataset = [row | {"labels": row["input_ids"]} for row in ROWS]
        trainer.args.max_steps = 2
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


# Padding on the left.


def first_loss(trainer, batches):
    """Return what the Trainer makes of batches that share an optimizer step: their summed losses, and the gradient."""
    made, count = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    total = sum(trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count) for batch in made)
    total.backward()
    return total.item(), {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same_loss(one, other):
    assert one[0] == pytest.approx(other[0], abs=1e-9)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_a_left_padded_batch_has_the_loss_of_a_right_padded_one(training, tmp_path):
    left, right = (
        first_loss(trainer_of(Trainer, tmp_path, tiny().train(training)), [labelled(side)(ROWS)])
        for side in ("left", "right")
    )
    assert_same_loss(left, right)


@pytest.mark.parametrize("collate", [labelled, lambda side: lambda rows: SleepCollator(side)(labels_of(rows))])
@pytest.mark.parametrize("kind", [Trainer, SleepTrainer])
def test_accumulated_left_padded_batches_have_the_loss_of_right_padded_ones(kind, collate, tmp_path, monkeypatch):
    """The plain Trainer needs a collator that ignores the labels that nothing predicts; else it says so, once."""
    warnings, results = [], {}
    monkeypatch.setattr("hf_sleep.modeling.outputs.logger.warning_once", warnings.append)
    for side in ("left", "right"):
        batches = [collate(side)(ROWS[i : i + 2]) for i in range(0, 8, 2)]
        results[side] = first_loss(trainer_of(kind, tmp_path, tiny().train()), batches)
    if kind is Trainer and collate is labelled:
        (warning,) = set(warnings)
        assert "num_items_in_batch counts labels that nothing predicts" in warning
        assert results["left"][0] == pytest.approx(results["right"][0], rel=0.05)
        assert results["left"][0] != pytest.approx(results["right"][0], rel=1e-6)
    else:
        assert not warnings
        assert_same_loss(results["left"], results["right"])


def labels_of(rows):
    return [row | {"labels": row["input_ids"]} for row in rows]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_sleep_trainer_evaluates_and_trains_alike_on_either_side(side, tmp_path):
    def run(collator):
        model = tiny()
        trainer = trainer_of(
            SleepTrainer,
            tmp_path,
            model,
            collator,
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            per_device_eval_batch_size=8,
        )
        trainer.train_dataset = labels_of(ROWS)
        loss = trainer.evaluate(labels_of(ROWS))["eval_loss"]
        trainer.train()
        return loss, model.state_dict()

    (loss, weights), (expected_loss, expected) = run(labelled(side)), run(SleepCollator())
    assert loss == pytest.approx(expected_loss, abs=1e-9)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-9)
