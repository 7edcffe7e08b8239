"""Schedules that users write: recorded in checkpoints, compared on resuming and restored, in a fresh process too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from families import make_model, sleep_config
from helpers import QUIET
from transformers import TrainerCallback

from hf_sleep.data.rule110 import Rule110
from hf_sleep.training import (
    DuringStep,
    HardEvictionWarmup,
    SleepCollator,
    SleepPassesSchedule,
    SleepTrainer,
    SleepTrainingArguments,
)

TASK = Rule110(width=6, steps=1, num_strings=2)
MODULE = '''
from hf_sleep.training import DuringStep, SleepPassesSchedule

class Base(DuringStep):
    """Has no change of its own."""

class NowAndThen(Base):
    def __init__(self, every, evictions=("sliding", "hard")):
        self.every, self.evictions = every, evictions

    def change(self, state, model):
        return model.sleeping(eviction=self.evictions[state.global_step % self.every == 0])

class Doubled(SleepPassesSchedule):
    """A subclass of a schedule of the package's."""

    def passes(self, step):
        return 2 * super().passes(step)
'''
RUN = """
import json, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {folder!r}]
from test_training_schedules import trainer_of
{imports}
trainer = trainer_of(Path(sys.argv[1]), [{callbacks}], **{fields!r})
trainer.train(resume_from_checkpoint=sys.argv[2] if len(sys.argv) > 2 else None)
restored = [c.state()["args"] for c in trainer._during_step()]
print("RESULT", json.dumps([[e["loss"] for e in trainer.state.log_history if "loss" in e], restored]))
"""


def trainer_of(path, callbacks, model=None, **fields):
    model = make_model("llama", sleep_config("llama", eviction="sliding")) if model is None else model
    arguments = SleepTrainingArguments(path, **QUIET | {"max_steps": 4} | fields)
    return SleepTrainer(model, arguments, SleepCollator(), train_dataset=TASK.dataset(16), callbacks=callbacks)


@pytest.fixture
def run(tmp_path):
    """Trains in a process of its own: losses and the callbacks' arguments, or what it ended with."""
    (tmp_path / "mine.py").write_text(MODULE, encoding="utf-8")

    def start(callbacks, *arguments, imports="from mine import *", **fields):
        where = {"tests": str(Path(__file__).parent), "folder": str(tmp_path)}
        script = RUN.format(imports=imports, callbacks=callbacks, fields=fields, **where)
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, cwd=tmp_path)
        if done.returncode:
            return done.stderr
        return json.loads(done.stdout.split("RESULT ")[1])

    return start


def test_a_schedule_of_a_user_s_own_is_recorded_compared_and_restored(run, tmp_path):
    callbacks, saving = "NowAndThen(2), Doubled(1, 2, steps=3)", {"save_strategy": "steps", "save_steps": 2}
    losses, arguments = run(callbacks, tmp_path / "whole", **saving)
    assert len(set(losses)) == 4
    assert losses != run("", tmp_path / "none", imports="")[0]
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    written = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["stateful_callbacks"]
    assert written["NowAndThen"]["args"] == {"every": 2, "evictions": ["sliding", "hard"]}
    assert written["Doubled"]["args"] == {"first": 1, "last": 2, "steps": 3, "seed": None}
    for more in ({}, {"restore_callback_states_from_checkpoint": True}):
        again, restored = run(callbacks, tmp_path / "again", checkpoint, **more)
        assert again == losses
        assert sorted(map(str, restored)) == sorted(map(str, arguments))
    for other, imports in (
        ("NowAndThen(3), Doubled(1, 2, steps=3)", "from mine import *"),
        ("NowAndThen(2), Doubled(1, 2, steps=4)", "from mine import *"),
        ("NowAndThen(2)", "from mine import *"),
        ("", "import mine"),
        ("", ""),
    ):
        refused = run(other, tmp_path / "other", checkpoint, imports=imports)
        assert "was trained with {'Doubled': {'first': 1, 'last': 2, 'seed': None, 'steps': 3}, 'NowAndThen'" in refused
        assert ("this run has none" in refused) == (not other)


class Threes(DuringStep):
    def change(self, state, model):
        return model.sleeping(sleep_passes=3)


class Again(Threes):
    pass


class Seen(TrainerCallback):
    def __init__(self):
        self.inside, self.outside = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.inside.append((model.config.sleep.sleep_passes, model.config.sleep.eviction))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.outside.append((model.config.sleep.sleep_passes, model.config.sleep.eviction))


@pytest.mark.parametrize("flip", [False, True])
def test_changes_are_taken_back_last_first(flip, tmp_path):
    """The Trainer calls callbacks in the same order at both ends of a step; the later of two changes to N holds."""
    schedules, seen = [Threes(), HardEvictionWarmup(steps=2), SleepPassesSchedule(5)], Seen()
    trainer = trainer_of(tmp_path, [*(schedules[::-1] if flip else schedules), seen])
    configured = trainer.model.config.sleep
    trainer.train()
    n = 3 if flip else 5
    assert seen.inside == [(n, "hard")] * 2 + [(n, "sliding")] * 2
    assert seen.outside == [(2, "sliding")] * 4
    assert trainer.model.config.sleep == configured


def test_two_models_in_turn_keep_their_own_changes(tmp_path):
    """One of them may be trained within another's step."""
    seen = []

    class Inner(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):
            inner = trainer_of(tmp_path, [Threes()], max_steps=1)
            inner.train()
            seen.append((model.config.sleep.sleep_passes, inner.model.config.sleep.sleep_passes))

    trainer = trainer_of(tmp_path, [SleepPassesSchedule(4), Inner()], max_steps=1, gradient_accumulation_steps=2)
    trainer.train()
    assert seen == [(4, 2)]
    assert trainer.model.config.sleep.sleep_passes == 2


def test_several_of_a_kind_resume_and_are_compared(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}

    def callbacks(last=4):
        return [SleepPassesSchedule(3), SleepPassesSchedule(1, last, seed=0), Again()]

    trainer_of(tmp_path, callbacks(), **saving).train()
    for step in (1, 3):
        resumed = trainer_of(tmp_path / "again", callbacks(), **saving)
        resumed.train(str(tmp_path / f"checkpoint-{step}"))
        assert resumed.state.global_step == 4
    for others in (callbacks(5), callbacks()[1:], callbacks()[:-1]):
        with pytest.raises(ValueError, match="pass the same callbacks to continue"):
            trainer_of(tmp_path / "other", others).train(str(tmp_path / "checkpoint-3"))


def test_arguments_that_cannot_be_recorded_are_refused(tmp_path):
    class Forgetful(Threes):
        def __init__(self, passes):
            self.n = passes

    with pytest.raises(TypeError, match=r"Forgetful: .* and passes cannot be found: keep it as self\.passes"):
        trainer_of(tmp_path, [Forgetful(3)])
