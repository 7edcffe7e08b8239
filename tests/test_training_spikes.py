"""SpikeGuard: what it skips, that nothing moves then, what it reports, when it stops, and that it resumes exactly."""

import copy
import math
import shutil
import statistics
from types import SimpleNamespace

import pytest
import torch
from families import make_model, sleep_config
from helpers import QUIET, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_sleep.data.rule110 import Rule110
from hf_sleep.training import (
    MuonAdamW,
    NonFiniteGuard,
    SleepCollator,
    SleepPassesSchedule,
    SleepTrainer,
    SleepTrainingArguments,
    SpikeGuard,
    spikes,
)

TASK = Rule110(width=6, steps=1, num_strings=2)


class Spikes(TrainerCallback):
    """Multiplies one gradient in some steps, and looks at weights and optimizer before and after each step."""

    def __init__(self, model, steps, scale=1e4):
        self.steps, self.scale, self.now = steps, scale, False
        self.still, self.stopped_at = [], None
        model.lm.model.layers[1].mlp.up_proj.weight.register_hook(self.change)

    def change(self, gradient):
        return gradient * self.scale if self.now else gradient

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.now = state.global_step + 1 in self.steps
        self.before = weights(model), copy.deepcopy(optimizer.state_dict())

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        (then, state_then), (now, state_now) = self.before, (weights(model), optimizer.state_dict())
        if all(torch.equal(then[name], now[name]) for name in then):
            self.still.append(state.global_step + 1)
            assert state_then["param_groups"] == state_now["param_groups"]
            assert state_then["state"].keys() == state_now["state"].keys()
            for index, values in state_then["state"].items():
                assert all(torch.equal(value, state_now["state"][index][key]) for key, value in values.items())


def trainer_of(path, steps=(), scale=1e4, plain=False, guard=None, before=(), **fields):
    model = make_model("llama", sleep_config("llama"))
    kind, arguments = (Trainer, TrainingArguments) if plain else (SleepTrainer, SleepTrainingArguments)
    settings = QUIET | {"max_steps": 8, "learning_rate": 1e-3, "weight_decay": 0.1, "lr_scheduler_type": "constant"}
    trainer = kind(model, arguments(path, **settings | fields), SleepCollator(), train_dataset=TASK.dataset(64))
    spikes = Spikes(model, steps, scale)
    for callback in (spikes, *before):
        trainer.add_callback(callback)
    if guard is not None:
        trainer.add_callback(SpikeGuard(trainer, **guard))
    return trainer, spikes


def logged(trainer, key):
    return [(entry["step"], entry[key]) for entry in trainer.state.log_history if key in entry]


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(spikes.logger, "warning", said.append)
    return said


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("plain", [True, False])
def test_a_spike_moves_nothing(plain, max_grad_norm, accumulation, warnings, tmp_path):
    fields = {"plain": plain, "max_grad_norm": max_grad_norm, "gradient_accumulation_steps": accumulation}
    trainer, seen = trainer_of(tmp_path, {2, 5, 7}, guard={"window": 3}, **fields)
    clip = trainer.accelerator.clip_grad_norm_
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW if plain else MuonAdamW)
    # The second step comes before there are three norms.
    assert seen.still == [5, 7]
    assert trainer.state.global_step == 8
    assert logged(trainer, "skipped_steps") == [(5, 1), (7, 2)]
    norms = dict(logged(trainer, "grad_norm"))
    median = statistics.median([norms[2], norms[3], norms[4]])
    assert warnings[0] == (
        f"SpikeGuard: step 5 is skipped: its gradient norm is {norms[5]:.3g}, "
        f"the running median (window=3) {median:.3g}"
    )
    assert len(warnings) == 2
    assert norms[5] > 100 * median
    assert trainer.accelerator.clip_grad_norm_ == clip


def test_without_it_muon_moves_as_far_as_ever(tmp_path):
    moved = []
    for steps in ((), {5}):
        trainer, seen = trainer_of(tmp_path, steps, max_steps=5)
        trainer.train()
        name = "lm.model.layers.1.mlp.up_proj.weight"
        assert seen.still == []
        moved.append((weights(trainer.model)[name] - seen.before[0][name]).norm().item())
    assert moved[1] > 0.5 * moved[0]


def test_the_guard_changes_nothing_else(tmp_path):
    guarded, free = (trainer_of(tmp_path, guard=guard)[0] for guard in ({"window": 2}, None))
    for trainer in (guarded, free):
        trainer.train()
    assert logged(guarded, "loss") == logged(free, "loss")
    a, b = weights(guarded.model), weights(free.model)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not logged(guarded, "skipped_steps")


@pytest.mark.parametrize(("factor", "skipped"), [(1e9, []), (20.0, [6])])
def test_the_factor_decides(factor, skipped, tmp_path):
    trainer, seen = trainer_of(tmp_path, {6}, guard={"window": 2, "factor": factor}, max_steps=6)
    trainer.train()
    assert seen.still == skipped


def test_a_norm_that_is_not_finite_is_skipped_from_the_first_step_on(warnings, tmp_path):
    trainer, seen = trainer_of(tmp_path, {1, 3}, scale=math.nan, guard={}, max_steps=4)
    trainer.train()
    assert seen.still == [1, 3]
    assert warnings == [f"SpikeGuard: step {step} is skipped: its gradient norm is nan" for step in (1, 3)]
    assert all(tensor.isfinite().all() for tensor in weights(trainer.model).values())


@pytest.mark.parametrize("first", [True, False])
def test_with_the_guard_of_what_is_not_finite_that_one_stops(first, tmp_path):
    others = [NonFiniteGuard()]
    trainer, _ = trainer_of(tmp_path, {2}, scale=math.nan, guard={}, before=others if first else ())
    if not first:
        trainer.add_callback(*others)
    with pytest.raises(FloatingPointError, match=r"in step 2: .*the gradient of lm.model.layers.1.mlp.up_proj.weight"):
        trainer.train()


def test_too_many_in_a_row_stop_the_run(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 1, "max_steps": 12}
    trainer, seen = trainer_of(tmp_path, {4, 5, 7, 8, 9}, guard={"window": 3, "max_skips": 3}, **fields)
    message = (
        rf"step 9 would be skipped, the last of 3 in a row: .*lower learning rates.*raise factor=10\. "
        rf"Last checkpoint: {tmp_path}/checkpoint-8$"
    )
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    assert seen.still == [4, 5, 7, 8]
    # The next training begins as if there had been none.
    seen.steps = ()
    trainer.train()
    assert trainer.state.global_step == 12


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_has_the_same_median(restore, tmp_path):
    """A spike that is one with the norms before the checkpoint alone; some in a row on both sides of it."""
    fields = {"save_strategy": "steps", "save_steps": 1, "restore_callback_states_from_checkpoint": restore}
    guard, schedule = {"window": 4, "max_skips": 3}, {"before": [SleepPassesSchedule(1, 2, seed=0)]}
    whole, seen = trainer_of(tmp_path / "whole", {5, 6, 8}, guard=guard, **schedule, **fields)
    whole.train()
    assert seen.still == [5, 6, 8]
    for step in (4, 5, 7):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        resumed, again = trainer_of(folder, {5, 6, 8}, guard=guard, **schedule, **fields)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert again.still == [spike for spike in seen.still if spike > step]
        for key in ("loss", "grad_norm", "skipped_steps"):
            assert logged(resumed, key) == logged(whole, key)
        assert resumed.state.stateful_callbacks[spikes.STATE] == whole.state.stateful_callbacks[spikes.STATE]
        a, b = weights(resumed.model), weights(whole.model)
        assert all(torch.equal(a[name], b[name]) for name in a)
    stop, _ = trainer_of(tmp_path / "from-7", {6, 7}, guard=guard | {"max_skips": 2}, **schedule, **fields)
    with pytest.raises(RuntimeError, match="step 6 would be skipped, the last of 2 in a row"):
        stop.train(resume_from_checkpoint=str(tmp_path / "from-5" / "checkpoint-5"))


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"trainer\.add_callback\(SpikeGuard\(trainer, \.\.\.\)\)"):
        SpikeGuard()
    trainer, _ = trainer_of(tmp_path)
    for fields in ({"factor": 1.0}, {"factor": math.inf}, {"window": 0}, {"max_skips": 0}):
        with pytest.raises(ValueError, match=f"SpikeGuard: {next(iter(fields))}="):
            SpikeGuard(trainer, **fields)
    guard = SpikeGuard(trainer)
    with pytest.raises(RuntimeError, match="this Trainer has taken no gradient norm"):
        guard.on_pre_optimizer_step(trainer.args, None, None)
    with pytest.raises(ValueError, match=r"SpikeGuard: with fp16=True"):
        guard.on_train_begin(SimpleNamespace(fp16=True), None, None)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match=r"SpikeGuard: DeepSpeed keeps the gradients"):
        guard.on_train_begin(trainer.args, None, None)
