"""State passing: what rows of a step begin with, that no gradient goes back, and where it is refused."""

import pytest
import torch
from families import make_model, sleep_config, tokens
from helpers import QUIET, weights
from peft import LoraConfig, get_peft_model

from hf_sleep import SleepCache
from hf_sleep.compat import CHECKPOINTING
from hf_sleep.memory import KV, FastWeights
from hf_sleep.training import SleepCollator, SleepTrainer, SleepTrainingArguments, WindowsCurriculum
from hf_sleep.training.passing import PassedStates

L = 6
ROWS = [{"input_ids": (ids := tokens(9 + 5 * i % 17, seed=i).tolist()), "labels": ids} for i in range(20)]


def tiny(family="llama", **fields):
    return make_model(family, sleep_config(family, **{"window_size": L} | fields))


def trainer_of(path, model=None, **fields):
    defaults = {"max_steps": 3, "pass_states": 1.0, "train_sampling_strategy": "sequential"}
    return SleepTrainer(
        tiny() if model is None else model,
        SleepTrainingArguments(path, **QUIET | defaults | fields),
        SleepCollator(),
        train_dataset=ROWS,
        eval_dataset=ROWS[:3],
    )


def logged(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.fixture
def watched():
    """Trains, and gives what each call in training read and was given to read into."""

    def train(trainer):
        calls = []

        def look(module, args, kwargs):
            if module.training:
                inputs = {name: kwargs[name] for name in ("input_ids", "attention_mask", "labels")}
                calls.append((inputs, kwargs["cache"].fork(), weights(module)))

        handle = trainer.model.register_forward_pre_hook(look, with_kwargs=True)
        trainer.train()
        handle.remove()
        return calls

    return train


def states_of(memory):
    """Fast weights and convolution tails of every row, `[B, numbers]`."""
    return torch.cat([t.flatten(1) for pair in memory.carried if isinstance(pair, FastWeights) for t in pair], 1)


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_reads_on_from_where_other_rows_ended(family, checkpointing, watched, tmp_path):
    model = tiny(family, sleep_passes=2)
    trainer = trainer_of(tmp_path, model, learning_rate=1e-2, max_grad_norm=1e9, **{CHECKPOINTING: checkpointing})
    calls = watched(trainer)
    assert calls[0][1].is_empty
    for step, (inputs, cache, values) in enumerate(calls):
        model.load_state_dict(values)
        model.zero_grad()
        mine = cache.fork()
        assert not any(t.requires_grad for pair in cache.memory.carried if pair is not None for t in pair)
        loss = model.train()(**inputs, cache=mine).loss
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert loss.item() == pytest.approx(logged(trainer)[step], rel=1e-5)
        assert norm.item() == pytest.approx(logged(trainer, "grad_norm")[step], rel=1e-4)
        if step + 1 < len(calls):
            left, begun = states_of(mine.memory).detach(), states_of(calls[step + 1][1].memory)
            matches = torch.cdist(left.double(), begun.double()) < 1e-4
            assert matches.sum(0).tolist() == matches.sum(1).tolist() == [1] * 4
        assert step == 0 or loss.item() != pytest.approx(model(**inputs).loss.item(), rel=1e-4)


def test_rows_begin_a_text_with_nothing_but_fast_weights(watched, tmp_path):
    trainer = trainer_of(tmp_path)
    calls = watched(trainer)
    for _, cache, _ in calls[1:]:
        assert not any(isinstance(pair, KV) for pair in cache.memory.carried)
        assert cache.memory.loop_output is None
        assert {(row.seen, row.fill, row.position) for row in cache.memory.counters} == {(0, 0, 0)}
    # A row may say where its tokens stand: its first is its first.
    inputs, cache, _ = calls[1]
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    trainer.model(**inputs, cache=cache, position_ids=positions)


def test_the_share_is_of_steps_and_depends_on_the_seed(watched, tmp_path):
    def begun(**fields):
        accumulated = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "max_steps": 10}
        return [not cache.is_empty for _, cache, _ in watched(trainer_of(tmp_path, **accumulated | fields))]

    some = begun(pass_states=0.5)
    assert 4 <= sum(some) <= 16
    assert some[2::2] == some[3::2]
    assert some == begun(pass_states=0.5)
    assert some != begun(pass_states=0.5, seed=1)
    assert begun() == [False] + [True] * 19


def test_batches_of_different_numbers_of_rows(tmp_path):
    model = tiny()
    passed = PassedStates(1.0, seed=0)
    for rows in (3, 5, 2, 1, 4):
        batch = SleepCollator()(ROWS[:rows])
        cache = passed.begin(rows, step=rows)
        assert cache.is_empty == (rows == 3)
        assert cache.is_empty or cache.batch_size == rows
        model.train()(**batch, cache=cache)
        passed.end(model, cache)


def test_without_it_nothing_changes_and_evaluation_begins_with_nothing(tmp_path):
    runs = {share: trainer_of(tmp_path, pass_states=share, eval_strategy="steps", eval_steps=3) for share in (0.0, 1.0)}
    for trainer in runs.values():
        trainer.train()
    assert logged(runs[0.0])[0] == logged(runs[1.0])[0]
    assert logged(runs[0.0])[1:] != logged(runs[1.0])[1:]
    model = runs[1.0].model.eval()
    batch = SleepCollator()(ROWS[:3])
    assert logged(runs[1.0], "eval_loss")[0] == pytest.approx(model(**batch, cache=SleepCache()).loss.item(), rel=1e-5)


@pytest.mark.parametrize("fields", [{"eviction": "sliding"}, {"num_sink_tokens": 2}])
def test_other_evictions_are_refused(fields, tmp_path):
    with pytest.raises(ValueError, match=r"pass_states=1.0 with eviction='\w+', num_sink_tokens=\d: .*pass_states=0"):
        trainer_of(tmp_path, tiny(**fields)).train()
    trainer_of(tmp_path, tiny(**fields), pass_states=0.0, max_steps=1).train()


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_from_0_to_1(share, tmp_path):
    with pytest.raises(ValueError, match=rf"pass_states={share} must be a share"):
        SleepTrainingArguments(tmp_path, pass_states=share)


def test_an_adapter_s_rows_begin_so_too(tmp_path):
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]))
    trainer = trainer_of(tmp_path, model, max_steps=2)
    calls = []
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["cache"].batch_size) if module.training else None,
        with_kwargs=True,
    )
    trainer.add_callback(WindowsCurriculum({0: 2}))
    trainer.train()
    assert calls == [0, 4]
    assert logged(trainer, "num_input_tokens_seen")[-1] <= 8 * 2 * L


def test_what_is_passed_on_is_no_sleep_that_anyone_is_told_of(tmp_path):
    model, told = tiny(window_size=64), []
    model.on_sleep(told.append)
    model.register_pass_hook(told.append)
    trainer_of(tmp_path, model).train()
    assert not told
