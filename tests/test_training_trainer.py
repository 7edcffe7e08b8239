"""SleepTrainer: what its arguments change, evaluation by difficulty, resuming to the last digit, what it refuses."""

import json
import re
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import make_base, make_model, sleep_config, tokens
from helpers import QUIET, weights
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from hf_sleep import SleepForCausalLM, sleep_lora_config
from hf_sleep.compat import CHECKPOINTING
from hf_sleep.data.depo import Depo
from hf_sleep.data.khop import KHop
from hf_sleep.data.rule110 import Rule110
from hf_sleep.training import (
    HardEvictionWarmup,
    MuonAdamW,
    SleepCollator,
    SleepPassesSchedule,
    SleepTrainer,
    SleepTrainingArguments,
    parameter_groups,
)
from hf_sleep.training import evaluation as evaluation_module
from hf_sleep.training.evaluation import accuracy_by_difficulty

TASK = Rule110(width=6, steps=1, num_strings=3)
KHOP = KHop(num_nodes=5, hops=(1, 2, 3), num_queries=3)


def tiny(seed=0, trained=True, **fields):
    return make_model("llama", sleep_config("llama", **fields), trained=trained, seed=seed)


def arguments(path, **fields):
    return SleepTrainingArguments(path, **QUIET | fields)


def trainer_of(path, model=None, rows=None, callbacks=None, eval_dataset=None, task=None, collator=None, **fields):
    return SleepTrainer(
        tiny() if model is None else model,
        arguments(path, **{"max_steps": 3} | fields),
        collator,
        train_dataset=TASK.dataset(32) if rows is None else rows,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        task=task,
    )


def logged(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a | b)


def trained(path, **fields):
    trainer = trainer_of(path, **fields)
    trainer.train()
    return weights(trainer.model)


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """The weights after three steps with the default arguments."""
    return trained(tmp_path_factory.mktemp("default"))


# It trains.


def test_it_learns_through_sleep_and_muon_is_not_adamw(tmp_path):
    """The bits are evicted before the answer is asked for: without memory the loss stays above 0.66."""
    task, losses = Rule110(width=6, steps=1, num_strings=1), {}
    for rate in (1e-2, None):
        model = tiny(trained=False)
        torch.manual_seed(0)
        for block in model.fast_weights.values():
            block.init_weights(0.02)
        trainer = trainer_of(
            tmp_path,
            model,
            task.dataset(512),
            max_steps=60,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            muon_learning_rate=rate,
        )
        before = weights(trainer.model)
        trainer.train()
        losses[rate] = logged(trainer)
        assert isinstance(trainer.optimizer.optimizer, MuonAdamW)
        assert all(tensor.ne(before[name]).any() for name, tensor in trainer.model.state_dict().items())
        assert np.mean(losses[rate][-10:]) < 0.2 < 3 < losses[rate][0]
    assert losses[1e-2][0] == losses[None][0]
    assert losses[1e-2][-1] != losses[None][-1]


def test_the_plain_trainer_takes_the_optimizer_and_the_collator(tmp_path):
    plain = TrainingArguments(tmp_path, max_steps=3, **QUIET)
    model = tiny()
    trainer = Trainer(
        model,
        plain,
        data_collator=SleepCollator(),
        train_dataset=TASK.dataset(32),
        optimizers=(MuonAdamW(parameter_groups(model), fused=True), None),
    )
    trainer.train()
    same_settings = {"adam_beta2": 0.95, "lr_scheduler_type": "linear", "warmup_steps": 0}
    assert same(weights(model), trained(tmp_path, **same_settings))


@pytest.mark.parametrize(
    "fields",
    [
        {"muon_learning_rate": 5e-3},
        {"muon_learning_rate": None},
        {"learning_rate": 1e-3},
        {"weight_decay": 0.5},
        {"adam_beta2": 0.5},
        {"max_grad_norm": 1e-3},
        {"lr_scheduler_type": "constant"},
    ],
)
def test_an_argument_changes_the_result(fields, default, tmp_path):
    assert not same(default, trained(tmp_path, **fields))


def test_the_gate_is_trained_at_its_own_rate(tmp_path):
    gates = {}
    for rate in (None, 3e-2):
        model = tiny(between="gate", sleep_passes=2)
        model.between.gate.data.zero_()
        settings = {"gate_learning_rate": rate, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 1}
        trainer = trainer_of(tmp_path / str(rate), model, save_strategy="steps", save_steps=1, **settings)
        trainer.train()
        gates[rate] = model.between.gate.abs().max().item()
    assert gates == {None: pytest.approx(1e-2, rel=1e-2), 3e-2: pytest.approx(3e-2, rel=1e-2)}
    again = trainer_of(tmp_path / "on", tiny(between="gate", sleep_passes=2), max_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "None" / "checkpoint-1"))
    assert again.state.global_step == 2


def test_backpropagation_through_all_windows_is_the_full_one(default, tmp_path):
    windows = TASK.num_strings + 1
    assert same(default, trained(tmp_path, backprop_windows=windows))
    assert not same(default, trained(tmp_path, backprop_windows=windows - 1))


def test_checkpointing_is_the_model_s_own_and_invisible(default, tmp_path):
    trainer = trainer_of(tmp_path, **{CHECKPOINTING: True})
    trainer.train()
    assert trainer.model.gradient_checkpointing
    assert not trainer.model.lm.model.gradient_checkpointing
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, default[name], rtol=0, atol=2e-5)


def test_the_learning_rate_warms_up_stays_and_decays(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=40, learning_rate=1.0, per_device_train_batch_size=1)
    trainer.create_optimizer_and_scheduler(40)
    rates = {kind: [] for kind in ("adamw", "muon")}
    for _ in range(40):
        for group in trainer.optimizer.param_groups:
            if group["kind"] in rates:
                rates[group["kind"]].append(group["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    # Two steps of warm-up, four of decay; Muon's rate has the same shape.
    assert rates["adamw"][:3] == [0.0, 0.5, 1.0]
    assert rates["adamw"][2:37] == [1.0] * 35
    assert rates["adamw"][36:] == sorted(rates["adamw"][36:], reverse=True)
    assert 0 < rates["adamw"][-1] < 0.2
    assert rates["muon"] == [1e-3 * rate for rate in rates["adamw"]]
    assert trainer.args.lr_scheduler_kwargs is None  # another train() with other steps has its own last tenth
    longer = trainer_of(tmp_path, lr_scheduler_kwargs={"num_decay_steps": 20, "min_lr_ratio": 0.5})
    longer.create_optimizer_and_scheduler(40)
    assert longer.lr_scheduler.lr_lambdas[0](30) < 1.0
    assert longer.lr_scheduler.lr_lambdas[0](40) == 0.5
    assert longer.args.lr_scheduler_kwargs == {"num_decay_steps": 20, "min_lr_ratio": 0.5}


def test_the_logs_count_real_tokens(tmp_path):
    rows = Dataset.from_list([{"input_ids": tokens(n).tolist(), "labels": tokens(n).tolist()} for n in (3, 20, 8, 14)])
    trainer = trainer_of(tmp_path, rows=rows, max_steps=2)
    trainer.train()
    assert logged(trainer, "num_input_tokens_seen")[:2] == [45, 90]
    assert all(speed > 0 for speed in logged(trainer, "train_tokens_per_second")[:2])


def test_the_arguments_come_from_a_command_line():
    parser = HfArgumentParser(SleepTrainingArguments)
    (parsed,) = parser.parse_args_into_dataclasses(["--muon_learning_rate", "2e-3", "--backprop_windows", "4"])
    assert (parsed.muon_learning_rate, parsed.backprop_windows) == (2e-3, 4)
    (parsed,) = parser.parse_args_into_dataclasses(["--gate_learning_rate", "0.1", "--eval_passes", "1", "4"])
    assert (parsed.gate_learning_rate, parsed.eval_passes) == (0.1, [1, 4])
    (default,) = parser.parse_args_into_dataclasses([])
    assert (default.gate_learning_rate, default.eval_passes) == (None, None)
    assert (default.muon_learning_rate, default.backprop_windows) == (1e-3, None)
    assert (default.learning_rate, default.adam_beta1, default.adam_beta2) == (5e-5, 0.9, 0.95)
    assert (default.weight_decay, default.max_grad_norm) == (1e-4, 1.0)


def test_a_step_without_labels_does_not_break_the_others(tmp_path):
    rows = TASK.dataset(3).to_list()
    rows[1]["labels"] = [-100] * TASK.length
    ordered = {"rows": rows, "train_sampling_strategy": "sequential", "per_device_train_batch_size": 1}
    trainer = trainer_of(tmp_path, **ordered, logging_nan_inf_filter=False)
    trainer.train()
    losses = logged(trainer)
    assert losses[1] == 0.0
    assert losses[0] > 0 < losses[2]
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())


def test_rows_may_be_longer_than_the_base_can_address(tmp_path):
    """Windows bound positions, so a row's length has no limit: here the base has 8 positions, a row 40 tokens."""
    base = make_base("llama")
    base.config.max_position_embeddings = 8
    model = SleepForCausalLM.from_base(base, sleep_config("llama", window_size=6, sleep_passes=2))
    ids = tokens(40).tolist()
    trainer = trainer_of(tmp_path, model, [{"input_ids": ids, "labels": ids}] * 4)
    trainer.train()
    assert logged(trainer)[0] > logged(trainer)[-1] > 0


# Evaluation by difficulty.


def judged(model, task, rows):
    """The naive twin: row by row, as `Task.score` says."""
    right = {}
    for row in rows:
        with torch.no_grad():
            logits = model.eval()(torch.tensor([row["input_ids"]])).logits[0]
        for difficulty, hit in task.score(logits.argmax(-1).tolist(), row):
            right.setdefault(difficulty, []).append(hit)
    return {difficulty: sum(hits) / len(hits) for difficulty, hits in right.items()}


@pytest.mark.parametrize("side", ["left", "right"])
def test_accuracy_by_difficulty_is_the_task_s(side, tmp_path):
    rows = KHOP.dataset(50, split="test")
    model = tiny(window_size=KHOP.window_size)
    fields = {"eval_dataset": rows, "task": KHOP, "per_device_eval_batch_size": 8, "rows": KHOP.dataset(64)}
    trainer = trainer_of(
        tmp_path,
        model,
        **fields,
        collator=SleepCollator(side),
        max_steps=30,
        learning_rate=1e-2,
        muon_learning_rate=1e-2,
    )
    trainer.train()
    metrics = trainer.evaluate()
    twin = judged(model, KHOP, rows)
    assert twin.keys() == set(KHOP.hops)
    assert any(0 < score < 1 for score in twin.values())
    for hop, score in twin.items():
        assert metrics[f"eval_accuracy_{hop}"] == score
        assert metrics[f"eval_chance_{hop}"] == KHOP.chance(hop)
    assert metrics["eval_accuracy"] == pytest.approx(np.mean(list(twin.values())))
    assert metrics["eval_chance"] == KHOP.chance(1)
    assert metrics["eval_accuracy"] in logged(trainer, "eval_accuracy")


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_rows_of_different_lengths_keep_their_difficulty(strategy, tmp_path):
    """Row i is right exactly where its difficulty is odd, whatever the order in which lengths would be grouped."""
    model, rows = tiny(), []
    for i, length in enumerate((9, 4, 15, 6, 12, 8)):
        ids = tokens(length, seed=i).tolist()
        with torch.no_grad():
            best = model.eval()(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        labels = [-100] * (length - 2) + best[-3:-1]
        if i % 2 == 0:
            labels[-1] = (labels[-1] + 1) % 61
        rows.append({"input_ids": ids, "labels": labels, "difficulty": i})
    rows = Dataset.from_list(rows)
    fields = {"eval_dataset": rows, "per_device_eval_batch_size": 2, "train_sampling_strategy": strategy}
    metrics = trainer_of(tmp_path, model, **fields).evaluate()
    assert [metrics[f"eval_accuracy_{i}"] for i in range(6)] == [0, 1, 0, 1, 0, 1]
    assert metrics["eval_accuracy"] == 0.5
    assert not any("chance" in name for name in metrics)


@pytest.mark.parametrize(
    "fields",
    [
        {"dataloader_drop_last": True},
        {"batch_eval_metrics": True},
        {"eval_do_concat_batches": False},
        {"dataloader_in_order": False, "dataloader_num_workers": 2},  # the second batch is ready first
    ],
)
def test_every_row_is_judged_whatever_becomes_of_batches(fields, tmp_path):
    model, rows = tiny(sleep_passes=2), KHOP.dataset(5, seed=1)
    settings = {"eval_dataset": rows, "task": KHOP, "per_device_eval_batch_size": 2, "eval_passes": [1]}
    expected = trainer_of(tmp_path, model, **settings).evaluate()

    def slowly(batch):
        time.sleep(0.3 * (batch[0]["input_ids"] == rows[0]["input_ids"]))
        return SleepCollator()(batch)

    trainer = trainer_of(tmp_path, model, **settings, **fields, collator=slowly)
    metrics = trainer.evaluate()
    kept = [name for name in expected if "accuracy" in name or "chance" in name or "loss" in name]
    assert len(kept) > 12
    assert {name: metrics[name] for name in kept} == {name: expected[name] for name in kept}
    assert all(getattr(trainer.args, name) == value for name, value in fields.items())


@pytest.mark.parametrize("rows", [[], Dataset.from_dict({"input_ids": [], "labels": []})])
@pytest.mark.parametrize("named", [False, True])
def test_no_rows_to_evaluate_are_refused(named, rows, tmp_path):
    with pytest.raises(ValueError, match="the evaluation dataset has no rows"):
        trainer_of(tmp_path, eval_dataset={"a": rows} if named else rows).evaluate()


def test_a_row_may_hold_several_answers_of_their_own_difficulty():
    task = Depo(max_nodes=6, max_hops=4, num_queries=4, pad_context=False)
    rows = task.dataset(8, split="test")
    width = max(len(row["labels"]) for row in rows)
    labels = np.full((8, width), -100)
    for i, row in enumerate(rows):
        labels[i, width - len(row["labels"]) :] = row["labels"]
    predicted = np.roll(labels, -1, axis=1)
    wrong = predicted.copy()
    wrong[:, np.flatnonzero(predicted[0] != -100)[0]] = 0  # the first query's first token, where row 0 has it
    for guess, most in ((predicted, 1.0), (wrong, 0.999)):
        metrics = accuracy_by_difficulty(rows, task, SimpleNamespace(predictions=guess, label_ids=labels))
        right = {}
        for i, row in enumerate(rows):
            said = guess[i, width - len(row["labels"]) :].tolist()
            for hop, hit in task.score(said, row):
                right.setdefault(hop, []).append(hit)
        assert {f"accuracy_{hop}": sum(hits) / len(hits) for hop, hits in right.items()}.items() <= metrics.items()
        assert metrics["accuracy"] <= most
        assert metrics["chance_1"] == 1 / 5
    shifted = np.roll(labels, -np.flatnonzero(labels[0] != -100)[0], axis=1)
    for others in (labels[::-1], shifted):
        with pytest.raises(ValueError, match="not those of the dataset's rows"):
            accuracy_by_difficulty(rows, task, SimpleNamespace(predictions=predicted, label_ids=others))


def test_only_ids_are_kept_and_named_datasets_work(tmp_path, monkeypatch):
    seen = []

    def spy(rows, task, predictions):
        seen.append((len(rows), predictions.predictions.shape))
        return {}

    monkeypatch.setattr(evaluation_module, "accuracy_by_difficulty", spy)
    sets = {"easy": TASK.dataset(6), "hard": TASK.dataset(4, seed=1)}
    metrics = trainer_of(tmp_path, eval_dataset=sets, per_device_eval_batch_size=4).evaluate()
    assert seen == [(6, (6, TASK.length)), (4, (4, TASK.length))]
    assert {"eval_easy_loss", "eval_hard_loss"} <= metrics.keys()


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_one_checkpoint_is_evaluated_at_every_n(named, adapted, tmp_path):
    model, rows = tiny(sleep_passes=2), KHOP.dataset(12, seed=1)
    model = get_peft_model(model, sleep_lora_config(model)) if adapted else model
    data, middle = ({"a": rows}, "a_") if named else (rows, "")

    class Told(TrainerCallback):
        names = ()

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            self.names += (set(metrics),)

    expected = {}
    plain = trainer_of(tmp_path, model, eval_dataset=data, task=KHOP)
    for passes in (1, 2, 4):
        with model.sleeping(sleep_passes=passes):
            metrics = plain.evaluate()
        kept = {name: value for name, value in metrics.items() if "loss" in name or "accuracy" in name}
        prefix = f"eval_{middle}" + ("" if passes == 2 else f"N{passes}_")
        expected |= {name.replace(f"eval_{middle}", prefix, 1): value for name, value in kept.items()}
    assert len(set(expected.values())) > 3
    told = Told()
    trainer = trainer_of(tmp_path, model, eval_dataset=data, task=KHOP, callbacks=[told], eval_passes=[1, 4])
    metrics = trainer.evaluate()
    assert {name: metrics[name] for name in expected} == expected
    assert {f"eval_{middle}N4_accuracy_3", f"eval_{middle}N1_chance", f"eval_{middle}accuracy"} <= set(metrics)
    assert model.config.sleep.sleep_passes == 2
    found = [(name, entry[name]) for entry in trainer.state.log_history for name in expected if name in entry]
    assert sorted(found) == sorted(expected.items())
    assert len(told.names) == 1
    assert not any("_N" in name for name in told.names[0])


def test_the_best_model_may_be_chosen_at_another_n(tmp_path):
    fields = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "eval_passes": [1]}
    fields |= {"metric_for_best_model": "N1_loss", "eval_dataset": TASK.dataset(8)}
    trainer = trainer_of(tmp_path, **fields)
    trainer.train()
    assert trainer.state.best_metric == min(logged(trainer, "eval_N1_loss"))
    assert len(logged(trainer, "eval_loss")) == 3


def test_metrics_of_one_s_own_stay_one_s_own(tmp_path):
    trainer = trainer_of(tmp_path, eval_dataset=TASK.dataset(4))
    trainer.compute_metrics = lambda prediction: {"shape": prediction.predictions.shape[-1]}
    metrics = trainer.evaluate()
    assert metrics["eval_shape"] == 61
    assert "eval_accuracy" not in metrics


def test_a_difficulty_without_labels_is_refused(tmp_path):
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "difficulty": 1}])
    with pytest.raises(ValueError, match="a difficulty but no labels"):
        trainer_of(tmp_path, eval_dataset=rows).evaluate()


# Resuming.


class Draws(TrainerCallback):
    """Draws from every generator that training may use, so that their states must be restored too."""

    def __init__(self):
        self.drawn = {}

    def on_step_end(self, args, state, control, **kwargs):
        self.drawn[state.global_step] = (torch.rand(()).item(), np.random.rand())


def resumable(path, seed, **fields):
    """9 steps over 2 epochs and a half of ragged rows, with dropout, a drawn N and both stages of the warm-up."""
    rows = [{"input_ids": tokens(9 + i).tolist(), "labels": tokens(9 + i).tolist()} for i in range(15)]
    model = tiny(seed, eviction="sliding", sleep_passes=2)
    for layer in model.lm.model.layers:
        layer.self_attn.attention_dropout = 0.2
    callbacks = [SleepPassesSchedule(1, 3, seed=7), HardEvictionWarmup(**fields or {"steps": 5}), Draws()]
    settings = {"max_steps": 9, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    settings |= {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "muon_learning_rate": 1e-2}
    return trainer_of(path, model, Dataset.from_list(rows), callbacks, **settings)


@pytest.mark.parametrize("warmup", [{"steps": 5}, {"epochs": 1.5}])
def test_a_resumed_run_is_the_uninterrupted_one(warmup, tmp_path):
    whole = resumable(tmp_path / "whole", seed=0, **warmup)
    whole.train()
    losses, end = logged(whole), weights(whole.model)
    assert len(set(losses)) == 9
    # In the first stage, at its end, in the second stage; within an epoch and at its end (4 steps).
    for step in (2, 4, 5, 7):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        resumed = resumable(folder, seed=5, **warmup)
        assert not same(weights(resumed.model), end)
        resumed.train(resume_from_checkpoint=True)
        assert logged(resumed) == losses
        assert logged(resumed, "learning_rate") == logged(whole, "learning_rate")
        assert logged(resumed, "grad_norm") == logged(whole, "grad_norm")
        assert same(weights(resumed.model), end)
        drawn = [
            next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Draws)).drawn
            for trainer in (resumed, whole)
        ]
        assert drawn[0] == {s: pair for s, pair in drawn[1].items() if s > step}


def checkpointed(path):
    """A run of two steps, and where its checkpoint is."""
    trainer = trainer_of(path, callbacks=[SleepPassesSchedule(1, 2, steps=2)], max_steps=2, save_strategy="steps")
    trainer.train()
    return str(path / "checkpoint-2")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"model": {"window_size": 7}}, r"sleep.window_size=6, this model has 7", id="window"),
        pytest.param(
            {"model": {"eviction": "sliding"}}, r"sleep.eviction='hard', this model has 'sliding'", id="evict"
        ),
        pytest.param({"model": {"loop_layers": (1, 3)}}, r"loop_layers=\[0, 4\], this model has \[1, 3\]", id="loop"),
        pytest.param({"callbacks": []}, r"'first': 1, .* this run has none", id="no schedule"),
        pytest.param({"callbacks": [SleepPassesSchedule(1, 3, steps=2)]}, r"'last': 2, .*'last': 3", id="schedule"),
        pytest.param(
            {"callbacks": [SleepPassesSchedule(1, 2, steps=2), HardEvictionWarmup(1)]},
            "HardEvictionWarmup",
            id="warmup",
        ),
        pytest.param({"muon_learning_rate": None}, "the same muon_learning_rate or None", id="optimizer"),
        pytest.param({"frozen": True}, "freeze its parameters as in the run", id="frozen"),
    ],
)
def test_another_run_s_checkpoint_is_refused_before_anything_changes(fields, message, tmp_path):
    folder = checkpointed(tmp_path / "first")
    fields = {"callbacks": [SleepPassesSchedule(1, 2, steps=2)]} | fields
    model = tiny(3, **fields.pop("model", {}))
    model.lm.model.embed_tokens.requires_grad_(not fields.pop("frozen", False))
    trainer = trainer_of(tmp_path / "second", model, **fields)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=folder)
    assert same(weights(model), before)
    assert trainer.optimizer is None


def test_a_run_from_before_there_were_half_lives_continues(tmp_path):
    """They are of first values alone."""
    callbacks, folder = [SleepPassesSchedule(1, 2, steps=2)], tmp_path / "checkpoint-2"
    checkpointed(tmp_path)
    for name in ("config.json", "trainer_state.json"):
        written = json.loads((folder / name).read_text(encoding="utf-8"))
        is_config = name == "config.json"
        sleep = (written if is_config else written["stateful_callbacks"]["SleepRecord"]["attributes"])["sleep"]
        del sleep["block_half_lives"], sleep["decay_once"]
        (folder / name).write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(ValueError, match=r"sleep\.decay_once=False, this model has True"):
        trainer_of(tmp_path / "other", tiny(decay_once=True), callbacks=callbacks).train(
            resume_from_checkpoint=str(folder)
        )
    for half_lives in ((0.25, 16.0), None):
        model = tiny(block_half_lives=half_lives)
        trainer = trainer_of(tmp_path / "on", model, callbacks=callbacks, max_steps=3)
        trainer.train(resume_from_checkpoint=str(folder))
        assert trainer.state.global_step == 3


def test_an_adapters_checkpoint_of_another_sleep_is_refused(tmp_path):
    def adapted(folder, **sleep):
        model = tiny(**sleep)
        blocks = [f"fast_weights.{layer}" for layer in model.fast_weights]
        lora = LoraConfig(r=2, target_modules=r"lm\..*_proj", modules_to_save=blocks, task_type="CAUSAL_LM")
        return trainer_of(folder, get_peft_model(model, lora), max_steps=2, save_strategy="steps", save_steps=1)

    adapted(tmp_path, window_size=6).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1" / "config.json").exists()
    for sleep in ({"window_size": 7}, {"window_size": 6, "sleep_passes": 4}):
        with pytest.raises(ValueError, match="was trained with sleep"):
            adapted(tmp_path / "other", **sleep).train(resume_from_checkpoint=checkpoint)
    again = adapted(tmp_path / "same", window_size=6)
    again.train(resume_from_checkpoint=checkpoint)
    assert again.state.global_step == 2


def test_a_run_may_restore_its_callbacks(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    restored = fields | {"restore_callback_states_from_checkpoint": True}
    trainer_of(tmp_path, tiny(), callbacks=[SleepPassesSchedule(1, 3, seed=0)], **fields).train()
    for step in (1, 2):  # the second time, from a checkpoint that such a run wrote
        trainer = trainer_of(tmp_path, tiny(), callbacks=[SleepPassesSchedule(1, 3, seed=0)], **restored)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert trainer.state.global_step == 3
    with pytest.raises(ValueError, match=r"was trained with sleep\.sleep_passes"):
        trainer_of(tmp_path, tiny(sleep_passes=7), **restored).train(str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_of_the_plain_trainer_goes_on(tmp_path):
    model, rows = tiny(), TASK.dataset(8)
    settings = QUIET | {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    Trainer(model, TrainingArguments(tmp_path, **settings), SleepCollator(), train_dataset=rows).train()
    fields = {"save_strategy": "steps", "save_steps": 1, "muon_learning_rate": None, "max_steps": 2}
    (tmp_path / "checkpoint-1" / "optimizer.pt").unlink()
    trainer = trainer_of(tmp_path / "on", tiny(), **fields)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == 2


def test_the_plain_trainer_goes_on_with_another_schedule(tmp_path):
    settings = QUIET | {"save_strategy": "steps", "save_steps": 1}
    for steps, callbacks in ((1, []), (2, [SleepPassesSchedule(2), HardEvictionWarmup(steps=2)])):
        arguments = TrainingArguments(tmp_path, **settings | {"max_steps": steps})
        trainer = Trainer(tiny(), arguments, SleepCollator(), train_dataset=TASK.dataset(8), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=steps > 1)
    assert trainer.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


def test_a_quantised_base_is_refused_before_steps_are_lost(tmp_path):
    model = tiny()
    model.lm.hf_quantizer = object()
    with pytest.raises(ValueError, match=r"save_strategy='steps': .* only_sleep=True"):
        trainer_of(tmp_path, model, save_strategy="steps").train()
    trainer_of(tmp_path, model, max_steps=1).train()


def test_labels_of_everything_are_judged_but_for_the_first_token(tmp_path):
    ids, model = [tokens(9, seed).tolist() for seed in range(4)], tiny()
    for row in ids[:2]:  # what the model says itself
        for column in range(1, 9):
            row[column] = model(torch.tensor([row[:column]])).logits[0, -1].argmax().item()
    rows = Dataset.from_list([{"input_ids": row, "labels": row, "difficulty": i % 2} for i, row in enumerate(ids)])
    scores = trainer_of(tmp_path, model, eval_dataset=rows).evaluate()
    assert (scores["eval_accuracy_0"], scores["eval_accuracy_1"]) == (0.5, 0.5)


def test_the_progress_bar_shows_tokens_per_second(tmp_path, capsys):
    trainer = trainer_of(tmp_path, disable_tqdm=False, max_steps=2, logging_steps=1)
    trainer.train()
    assert re.search(r"2/2 \[.*, [\d,]+ tokens/s", capsys.readouterr().err)


def test_an_interrupted_step_leaves_the_model_as_configured(tmp_path):
    class Interrupt(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            assert (model.config.sleep.sleep_passes, model.config.sleep.eviction) == (3, "hard")
            assert not model.lm.model.embed_tokens.weight.requires_grad
            raise KeyboardInterrupt

    callbacks = [SleepPassesSchedule(3), HardEvictionWarmup(2), Interrupt()]
    trainer = trainer_of(tmp_path, tiny(eviction="sliding"), callbacks=callbacks)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (trainer.model.config.sleep.sleep_passes, trainer.model.config.sleep.eviction) == (2, "sliding")
    assert all(p.requires_grad for p in trainer.model.parameters())


# Rows and arguments that cannot be trained with.


@pytest.mark.parametrize(
    ("row", "message"),
    [
        pytest.param({"input_ids": [1, 2, 3]}, "rows without labels", id="none"),
        pytest.param({"input_ids": [1, 2, 3], "labels": [-100] * 3}, "none of the first 4 rows", id="all ignored"),
        pytest.param(
            {"input_ids": [1, 2], "labels": [1, -100]}, "first token of a row cannot be predicted", id="first"
        ),
        pytest.param(
            {"input_ids": [9, 1, 2], "labels": [-100, 1, -100], "attention_mask": [0, 1, 1]},
            "none of the",
            id="after pad",
        ),
        pytest.param(
            {"input_ids": [1, 2], "labels": [1, 2], "position_ids": [0, 0]}, "several packed samples", id="packed"
        ),
    ],
)
@pytest.mark.parametrize("kind", [Dataset.from_list, list, lambda rows: Dataset.from_list(rows).to_iterable_dataset()])
def test_rows_that_cannot_be_trained_on_are_refused(kind, row, message, tmp_path):
    trainer = trainer_of(tmp_path, rows=kind([row] * 4))
    before = weights(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert same(weights(trainer.model), before)
    assert trainer.optimizer is None


def test_an_endless_stream_trains(tmp_path):
    trainer = trainer_of(tmp_path, rows=TASK.stream())
    trainer.train()
    assert len(logged(trainer)) == 3


def test_arguments_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="optim='adafactor' with muon_learning_rate"):
        arguments(tmp_path, optim="adafactor")
    with pytest.raises(ValueError, match=r"optim='sgd' with gate_learning_rate=0\.1: .* Set gate_learning_rate=None"):
        arguments(tmp_path, optim="sgd", muon_learning_rate=None, gate_learning_rate=0.1)
    with pytest.raises(ValueError, match=r"gate_learning_rate=0\.0 must be above 0, or None for 0\.01"):
        arguments(tmp_path, gate_learning_rate=0.0)
    with pytest.raises(ValueError, match=r"eval_passes: N=0 cannot work: it must be an integer of at least 1"):
        arguments(tmp_path, eval_passes=[1, 0])
    with pytest.raises(ValueError, match="backprop_windows=0 must be at least 1"):
        arguments(tmp_path, backprop_windows=0)
    with pytest.raises(ValueError, match=r"muon_learning_rate=0\.0 must be above 0, or None for AdamW"):
        arguments(tmp_path, muon_learning_rate=0.0)
    with pytest.raises(TypeError, match="SleepTrainer needs SleepTrainingArguments as args, not TrainingArguments"):
        SleepTrainer(tiny(), TrainingArguments(tmp_path, **QUIET))


def test_another_optimizer_may_be_chosen(tmp_path):
    trainer = trainer_of(tmp_path, muon_learning_rate=None, optim="sgd")
    trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.SGD
