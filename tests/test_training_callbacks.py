"""Callbacks: what each changes for a step and takes back, what each measures, and when each stops a run."""

import gc
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from families import make_model, sleep_config, tokens
from helpers import QUIET, weights
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_sleep import SleepCache, sleep_lora_config
from hf_sleep.compat import CHECKPOINTING
from hf_sleep.data.khop import KHop
from hf_sleep.data.rule110 import Rule110
from hf_sleep.layers.recurrence import GatedDeltaMixer
from hf_sleep.training import (
    GenerationEvaluation,
    HardEvictionWarmup,
    MuonAdamW,
    NonFiniteGuard,
    SleepCollator,
    SleepMonitor,
    SleepPassesSchedule,
    SleepTrainer,
    SleepTrainingArguments,
)
from hf_sleep.training import parameters as parameters_module
from hf_sleep.training.monitor import gates, pass_sums

TASK = Rule110(width=6, steps=1, num_strings=2)


def tiny(family="llama", **fields):
    return make_model(family, sleep_config(family, **fields))


def trainer_of(path, model=None, callbacks=(), plain=False, rows=None, eval_dataset=None, **fields):
    kind, arguments = (Trainer, TrainingArguments) if plain else (SleepTrainer, SleepTrainingArguments)
    return kind(
        tiny() if model is None else model,
        arguments(path, **QUIET | {"max_steps": 4} | fields),
        SleepCollator(),
        train_dataset=TASK.dataset(32) if rows is None else rows,
        eval_dataset=eval_dataset,
        callbacks=list(callbacks),
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def changed(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


class Seen(TrainerCallback):
    """Notes what the model was in every training forward, and in every evaluation and saving."""

    def __init__(self):
        self.forward, self.outside = [], []

    @staticmethod
    def look(model):
        frozen = sum(not p.requires_grad for p in model.parameters())
        return model.config.sleep.sleep_passes, model.config.sleep.eviction, frozen > 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_pre_hook(lambda m, _: self.forward.append(self.look(m)) if m.training else None)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.outside.append(self.look(model))

    on_save = on_evaluate


# N by step.


def test_schedules_of_n():
    assert [SleepPassesSchedule(3).passes(step) for step in (0, 10**6)] == [3, 3]
    up = SleepPassesSchedule(1, 4, steps=6)
    assert [up.passes(step) for step in range(8)] == [1, 1, 2, 2, 3, 3, 4, 4]
    down = SleepPassesSchedule(3, 1, steps=4)
    assert [down.passes(step) for step in range(6)] == [3, 3, 2, 2, 1, 1]
    drawn = [SleepPassesSchedule(2, 4, seed=1).passes(step) for step in range(300)]
    assert all(80 < drawn.count(n) < 120 for n in (2, 3, 4))
    assert drawn != [SleepPassesSchedule(2, 4, seed=2).passes(step) for step in range(300)]
    # A function of (seed, step) alone: no generator is moved on, in whatever order it is asked.
    torch.manual_seed(5)
    assert drawn[::-1] == [SleepPassesSchedule(2, 4, seed=1).passes(step) for step in range(300)][::-1]


@pytest.mark.parametrize(
    "arguments", [(0,), (1.5,), (1, 2), (1, None, 5), (1, 2, 5, 0), (3, 2, None, 0), (1, 2, 0), (1, None, None, 3)]
)
def test_schedules_that_cannot_work_are_refused(arguments):
    with pytest.raises(ValueError, match="SleepPassesSchedule: "):
        SleepPassesSchedule(*arguments)


@pytest.mark.parametrize("plain", [True, False])
def test_a_step_runs_with_its_n_and_the_rest_with_the_config_s(plain, tmp_path):
    seen = Seen()
    schedule = SleepPassesSchedule(1, 4, steps=3)
    fields = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": TASK.dataset(4), "save_strategy": "steps"}
    fields |= {"save_steps": 2, "gradient_accumulation_steps": 2}
    trainer = trainer_of(tmp_path, tiny(sleep_passes=2), [seen, schedule], plain, **fields)
    trainer.train()
    assert [n for n, *_ in seen.forward] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert {n for n, *_ in seen.outside} == {2}
    assert len(seen.outside) == 6
    assert '"sleep_passes": 2' in (tmp_path / "checkpoint-2" / "config.json").read_text(encoding="utf-8")


def test_a_fixed_n_is_the_config_s_n(tmp_path):
    scheduled = trainer_of(tmp_path, tiny(sleep_passes=2), [SleepPassesSchedule(3)])
    configured, other = trainer_of(tmp_path, tiny(sleep_passes=3)), trainer_of(tmp_path, tiny(sleep_passes=2))
    for trainer in (scheduled, configured, other):
        trainer.train()
    assert losses(scheduled) == losses(configured)
    assert not changed(scheduled.model, weights(configured.model))
    assert losses(scheduled) != losses(other)


class StopHalfway(TrainerCallback):
    """Ends training between two micro-batches, or in the middle of one, once."""

    def __init__(self, interrupt):
        self.interrupt = interrupt

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 1 and self.interrupt is not None:
            interrupt, self.interrupt = self.interrupt, None
            if interrupt:
                raise KeyboardInterrupt
            control.should_training_stop = True


def test_with_the_plain_trainer_a_step_half_done_is_taken_back(tmp_path):
    model = tiny(eviction="sliding", sleep_passes=2)
    callbacks = [SleepPassesSchedule(3), HardEvictionWarmup(9)]
    half = StopHalfway(interrupt=False)
    trainer_of(tmp_path, model, [*callbacks, half], plain=True, gradient_accumulation_steps=2).train()
    assert half.interrupt is None
    assert Seen.look(model) == (2, "sliding", False)
    trainer = trainer_of(
        tmp_path, model, [*callbacks, StopHalfway(interrupt=True)], plain=True, gradient_accumulation_steps=2
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    # Nobody tells a plain Trainer's callback; the next training does, and the last word is the config's own.
    assert Seen.look(model) == (3, "hard", True)
    trainer.train()
    assert Seen.look(model) == (2, "sliding", False)


# Hard eviction first.

MIXERS = {
    "llama": ("fast_weights.",),
    "ouro": ("fast_weights.",),
    "jet_nemotron": ("fast_weights.", "lm.model.layers.0.self_attn.", "lm.model.layers.2.self_attn."),
    "qwen3_next": ("fast_weights.", "lm.model.layers.0.linear_attn.", "lm.model.layers.2.linear_attn."),
    "granitemoehybrid": ("fast_weights.", "lm.model.layers.0.mamba.", "lm.model.layers.2.mamba."),
    "kimi_linear": ("fast_weights.", "lm.model.layers.0.self_attn.", "lm.model.layers.2.self_attn."),
}


@pytest.mark.parametrize(("family", "plain"), [*((family, False) for family in MIXERS), ("llama", True)])
def test_first_the_fast_weights_alone_with_hard_eviction(family, plain, tmp_path):
    model, seen = tiny(family, eviction="sliding", sleep_passes=2), Seen()
    model.lm.model.norm.requires_grad_(False)
    start, middle = weights(model), {}

    class Middle(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == 2:
                middle["weights"] = weights(model)
                names = {id(p): name for name, p in model.named_parameters()}
                middle["states"] = {names[id(p)] for p in optimizer.state}

    trainer = trainer_of(tmp_path, model, [seen, HardEvictionWarmup(steps=2), Middle()], plain, learning_rate=1e-2)
    trainer.train()
    trainable = {name for name, _ in model.named_parameters() if name.startswith(MIXERS[family])}
    first = {name for name in start if not torch.equal(start[name], middle["weights"][name])}
    assert first == middle["states"] == trainable
    second = changed(model, middle["weights"])
    # Ouro's exit gate takes no part in sleep; Kimi Linear's buffer has no gradient; what was frozen before stays so.
    idle = {name for name in start if "early_exit_gate" in name or "e_score_correction_bias" in name}
    idle.add("lm.model.norm.weight")
    assert second == set(start) - idle
    assert [eviction for _, eviction, _ in seen.forward] == ["hard", "hard", "sliding", "sliding"]
    assert model.config.sleep.eviction == "sliding"
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"lm.model.norm.weight"}


def test_stages_by_epochs_and_between_steps_all_is_as_configured(tmp_path):
    seen = Seen()
    fields = {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 4}
    model = tiny(eviction="sliding")
    warmup = HardEvictionWarmup(epochs=0.5)
    trainer_of(tmp_path, model, [seen, warmup], rows=TASK.dataset(16), eval_dataset=TASK.dataset(4), **fields).train()
    assert [frozen for *_, frozen in seen.forward] == [True] * 2 + [False] * 6
    assert seen.outside == [(2, "sliding", False)] * 8


def test_a_warm_up_with_nothing_to_train_is_refused(tmp_path):
    model = tiny()
    model.fast_weights.requires_grad_(False)
    before = weights(model)
    with pytest.raises(ValueError, match="all fast weights are frozen"):
        trainer_of(tmp_path, model, [HardEvictionWarmup(1)]).train()
    assert not changed(model, before)
    for arguments in ((None, None), (2, 1.0), (0, None), (None, -1.0)):
        with pytest.raises(ValueError, match="give one of the two, above 0"):
            HardEvictionWarmup(*arguments)


# What is not finite.


def broken_gradient(model, name, calls):
    """Breaks one parameter's gradient from its `calls`-th backward on."""
    count = [0]

    def spoil(gradient):
        count[0] += 1
        return gradient * math.nan if count[0] >= calls else gradient

    model.get_parameter(name).register_hook(spoil)


@pytest.mark.parametrize("plain", [True, False])
def test_a_broken_gradient_stops_before_it_is_stepped_on(plain, tmp_path):
    model, name = tiny(), "lm.model.layers.2.mlp.up_proj.weight"
    broken_gradient(model, name, calls=3)
    trainer = trainer_of(tmp_path, model, [NonFiniteGuard()], plain, save_strategy="steps", save_steps=1)
    message = rf"in step 3: the loss is \d.*: the gradient of {name}. Last good checkpoint: {tmp_path}/checkpoint-2$"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    saved = type(model).from_pretrained(tmp_path / "checkpoint-2")
    assert not changed(model, weights(saved))
    assert not (tmp_path / "checkpoint-3").exists()


def test_the_first_gradient_is_this_step_s_first(tmp_path):
    """A gradient that there was none of in the first stage may still come first in the second one's backward."""
    model = tiny(eviction="sliding")
    broken_gradient(model, "lm.model.layers.3.mlp.down_proj.weight", calls=1)
    broken_gradient(model, "fast_weights.0.mixer.o_proj.weight", calls=3)
    trainer = trainer_of(tmp_path, model, [HardEvictionWarmup(2), NonFiniteGuard()])
    with pytest.raises(FloatingPointError, match=r"step 3: .*gradient of lm.model.layers.3.mlp.down_proj.weight"):
        trainer.train()


def test_a_broken_loss_is_named_with_the_weight_that_broke_it(tmp_path):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                model.lm.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.inf

    trainer = trainer_of(tmp_path, callbacks=[NonFiniteGuard(), Break()])
    with pytest.raises(FloatingPointError, match=r"step 2: the loss is nan.*the weight lm.model.layers.1.mlp.up_proj"):
        trainer.train()


@pytest.mark.parametrize("strategy", ["steps", "epoch", "best"])
def test_a_broken_model_is_never_saved(strategy, tmp_path):
    class Break(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.fast_weights["0"].mixer.A_log.data[0] = math.nan

    fields = {"save_strategy": strategy, "save_steps": 2, "rows": TASK.dataset(8), "save_total_limit": 1}
    if strategy == "best":
        fields |= {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": TASK.dataset(4)}
        fields |= {"metric_for_best_model": "loss"}
    trainer = trainer_of(tmp_path, None, [Break(), NonFiniteGuard()], **fields)
    with pytest.raises(FloatingPointError, match=r"step 4: .*the weight fast_weights.0.mixer.A_log.*checkpoint-2$"):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_the_guard_changes_nothing_else(tmp_path):
    guarded, free = trainer_of(tmp_path, callbacks=[NonFiniteGuard()]), trainer_of(tmp_path)
    for trainer in (guarded, free):
        trainer.train()
    assert losses(guarded) == losses(free)
    assert not guarded.model._forward_hooks
    assert not any(p._post_accumulate_grad_hooks for p in guarded.model.parameters())


def test_several_ranks_and_precisions_that_cannot_work_are_refused(tmp_path, monkeypatch):
    model = tiny()
    with pytest.raises(ValueError, match="NonFiniteGuard: with fp16=True"):
        NonFiniteGuard().on_train_begin(SimpleNamespace(fp16=True), None, None, model=model)
    ranks = SimpleNamespace(world_size=2)
    for unused, checkpointing in ((None, True), (False, False)):
        vars(ranks).update({"ddp_find_unused_parameters": unused, CHECKPOINTING: checkpointing})
        with pytest.raises(ValueError, match="on several ranks needs ddp_find_unused_parameters=True"):
            HardEvictionWarmup(1).on_train_begin(ranks, None, None, model=model)
    with pytest.raises(ValueError, match=r"epochs=1.5 with ignore_data_skip=True: .* Give the stage in steps"):
        trainer_of(tmp_path, callbacks=[HardEvictionWarmup(epochs=1.5)], ignore_data_skip=True).train()
    monkeypatch.setattr(parameters_module, "DTensor", torch.nn.Parameter)
    trainer = trainer_of(tmp_path)
    for callback in (HardEvictionWarmup(1), NonFiniteGuard(), SleepMonitor(trainer)):
        with pytest.raises(ValueError, match=f"{type(callback).__name__} does not work on sharded parameters"):
            callback.on_train_begin(trainer.args, None, None, model=model)


# What is measured.


def monitored(path, model, rows=None, every=1, plain=False, **fields):
    trainer = trainer_of(path, model, plain=plain, rows=rows, **fields)
    trainer.add_callback(SleepMonitor(trainer, every=every, rows=3))
    trainer.train()
    return trainer


def measurements(trainer):
    return [entry for entry in trainer.state.log_history if "sleep_share" in entry]


def test_windows_are_measured_where_the_data_ends_them(tmp_path):
    rows = [{"input_ids": tokens(n, n).tolist(), "labels": tokens(n, n).tolist()} for n in (14, 9, 20)]
    for row, ends in zip(rows, ((3, 8), (0,), (7,)), strict=True):
        row["sleep_after"] = [int(i in ends) for i in range(len(row["input_ids"]))]
    model = tiny(sleep_passes=2)
    measured = measurements(monitored(tmp_path, model, rows, max_steps=1, per_device_train_batch_size=3))[-1]
    with torch.no_grad():
        whole = model.eval()(**SleepCollator("left")(rows)).loss
    # Windows of L = 6: 4, 5 and 5 tokens; 1, 6 and 2; 6, 2, 6 and 6. The last token of a row predicts nothing.
    counts = [4 + 1 + 6, 5 + 6 + 2, 4 + 1 + 6, 5]
    by_window = [measured[f"loss_window_{i + 1}"] for i in range(4)]
    mean = sum(loss * count for loss, count in zip(by_window, counts, strict=True)) / sum(counts)
    assert mean == pytest.approx(whole.item(), rel=1e-5)
    assert "loss_window_5" not in measured


class Positional(SleepTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"]).loss


class Embedding(SleepTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        return model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], labels=inputs["labels"]).loss


def measured_by(path, kind=SleepTrainer, own=None, adapted=False, **fields):
    model = tiny(sleep_passes=2)
    model = get_peft_model(model, sleep_lora_config(model, r=2)) if adapted else model
    fields = QUIET | {"max_steps": 1, "learning_rate": 0.0, "muon_learning_rate": None, "weight_decay": 0.0} | fields
    trainer = kind(model, SleepTrainingArguments(path, **fields), train_dataset=TASK.dataset(4), compute_loss_func=own)
    trainer.add_callback(SleepMonitor(trainer, every=1))
    trainer.train()
    return {name: value for name, value in measurements(trainer)[0].items() if not name.startswith(("sleep_", "grad"))}


def mean_loss(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", [Positional, Embedding])
def test_a_batch_is_measured_however_the_model_was_given_it(kind, adapted, tmp_path):
    measured = measured_by(tmp_path, kind, adapted=adapted)
    assert measured == pytest.approx(measured_by(tmp_path, adapted=adapted), rel=1e-5)
    assert any(name.startswith("loss_window") for name in measured)


@pytest.mark.parametrize("given", [{"label_smoothing_factor": 0.1}, {"own": mean_loss}])
def test_without_labels_all_but_the_losses_is_measured(given, tmp_path):
    expected = {name: value for name, value in measured_by(tmp_path).items() if not name.startswith("loss_")}
    assert len(expected) > 6
    assert measured_by(tmp_path, **given) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_the_loss_by_window_is_the_loss(eviction, tmp_path):
    rows = [{"input_ids": tokens(n, n).tolist(), "labels": tokens(n, n).tolist()} for n in (4, 14, 20, 9)]
    model = tiny(eviction=eviction, sleep_passes=3)
    fields = {"train_sampling_strategy": "sequential", "max_steps": 2}
    measured = measurements(monitored(tmp_path, model, rows, **fields))[-1]
    batch = SleepCollator("left")(rows[:3])
    with torch.no_grad():
        whole = model.eval()(**batch).loss
    counts = [3 + 6 + 6, 6 + 6, 1 + 6, 1]
    by_window = [measured[f"loss_window_{i + 1}"] for i in range(4)]
    mean = sum(loss * count for loss, count in zip(by_window, counts, strict=True)) / sum(counts)
    assert mean == pytest.approx(whole.item(), rel=1e-5)
    assert len(set(by_window)) == 4
    assert "loss_window_5" not in measured


def test_the_state_and_the_gates_are_the_model_s(tmp_path):
    model = tiny(sleep_passes=2, block_kind="gated_delta_net")
    for mixer in (module for module in model.modules() if isinstance(module, GatedDeltaMixer)):
        mixer.b_proj.weight.data.zero_()
        mixer.a_proj.weight.data.zero_()
        mixer.A_log.data.fill_(0.0)
        mixer.dt_bias.data.fill_(0.5)
        mixer.requires_grad_(False)
    trainer = monitored(tmp_path, model, max_steps=1, train_sampling_strategy="sequential", learning_rate=0.0)
    measured = measurements(trainer)[0]
    assert measured["mean_beta"] == 0.5
    assert measured["mean_decay"] == pytest.approx(math.exp(-math.log1p(math.exp(0.5))), rel=1e-6)
    cache, rows = SleepCache(), torch.tensor(TASK.dataset(3)["input_ids"])
    with torch.no_grad():
        model.eval()(rows, cache=cache)
    states = torch.stack([cache.memory.carried[slot][0] for slot in sorted(cache.fast_slots)])
    assert measured["fast_weight_norm"] == pytest.approx(states.norm(dim=(-2, -1)).mean().item(), rel=1e-4)
    spectrum = torch.linalg.svdvals(states)
    share = spectrum / spectrum.sum(-1, keepdim=True)
    rank = (-(share * share.clamp(min=1e-30).log()).sum(-1)).exp().mean().item()
    assert measured["fast_weight_rank"] == pytest.approx(rank, rel=1e-4)
    assert 1 < rank < 8


@pytest.mark.parametrize("family", ["llama", "jet_nemotron", "qwen3_next", "qwen3_5", "olmo_hybrid"])
def test_pads_are_no_part_of_the_gates(family):
    model, rows = tiny(family), [{"input_ids": tokens(n, n).tolist()} for n in (20, 8)]
    sums = []
    for batch in ([rows[0]], [rows[1]], rows):
        with gates() as found, torch.no_grad():
            model(**SleepCollator()(batch))
        sums.append(found)
    seen = {name: list(total) for name, total in found.items()}
    with torch.no_grad():
        model(**SleepCollator()(rows))
    assert found == seen
    for name, (total, count) in sums[2].items():
        assert total == pytest.approx(sums[0][name][0] + sums[1][name][0], rel=1e-5)
        assert count == sums[0][name][1] + sums[1][name][1]
        if family == "llama":
            # Two layers of two heads; N = 2 reads each full window twice.
            assert count == 4 * (20 + 18 + 8 + 6)


@pytest.mark.parametrize("family", ["jet_nemotron", "qwen3_next", "qwen3_5", "olmo_hybrid", "ouro"])
def test_gates_of_every_family_are_its_own(family):
    model = tiny(family) if family == "ouro" else tiny(family, block_layers=())
    for name, parameter in model.named_parameters():
        if any(f"{gate}_proj" in name or f"in_proj_{gate}." in name for gate in ("a", "b", "ba")):
            parameter.data.zero_()
        elif name.endswith("A_log"):
            parameter.data.fill_(math.log(2))
        elif name.endswith("dt_bias"):
            parameter.data.fill_(0.5)
    with gates() as found, torch.no_grad():
        model(tokens(20)[None])
    means = {name: total / count for name, (total, count) in found.items()}
    doubled = getattr(model.config.text_config, "linear_allow_neg_eigval", False)
    assert means["mean_beta"] == (1.0 if doubled else 0.5)
    assert means["mean_decay"] == pytest.approx(math.exp(-2 * math.log1p(math.exp(0.5))), rel=1e-6)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_norms_are_those_of_the_loss(eviction, passes, checkpointing, tmp_path):
    """Against autograd, through a cache that is moved on by hand; rows of different lengths, two micro-batches."""
    rows = [{"input_ids": tokens(n, n).tolist(), "labels": tokens(n, n).tolist()} for n in (20, 14, 13, 19)]
    model = tiny(eviction=eviction, sleep_passes=passes)
    size, expected, scale = model.config.sleep.window_size, {}, sum(len(row["labels"]) - 1 for row in rows)
    # By hand, row by row: the states after each pass, and the loss's gradient with respect to them.
    for row in rows:
        ids, cache, events = torch.tensor([row["input_ids"]]), SleepCache(), []
        handle = model.train().register_pass_hook(events.append)
        logits = [model(part, cache=cache, use_cache=True).logits for part in ids.split(size, dim=1)]
        handle.remove()
        states = [(event.number, state) for event in events for state in event.written]
        loss = torch.nn.functional.cross_entropy(torch.cat(logits, 1)[0, :-1], ids[0, 1:], reduction="sum") / scale
        found = torch.autograd.grad(loss, [state for _, state in states], allow_unused=True)
        assert [n for n, _ in states[:: len(cache.fast_slots)]] == list(range(1, passes + 1)) * (
            (len(ids[0]) - 1) // size
        )
        for (n, _), gradient in zip(states, found, strict=True):
            expected[n] = expected.get(n, 0.0) + (0 if gradient is None else gradient.double().square().sum().item())
    trainer = monitored(
        tmp_path,
        model,
        rows,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **{CHECKPOINTING: checkpointing},
    )
    measured = measurements(trainer)[0]
    names = {name for name in measured if name.startswith("gradient_norm")}
    assert names == {f"gradient_norm_pass_{n}" for n in range(1, passes + 1)}
    for n, square in expected.items():
        assert measured[f"gradient_norm_pass_{n}"] == pytest.approx(math.sqrt(square), rel=1e-4), n
        assert square > 0
    assert not model._pass_hooks


def test_passes_are_watched_where_the_next_log_is_measured(tmp_path):
    class Hooks(TrainerCallback):
        watched = ()

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.watched += (len(model._pass_hooks),)

    model, hooks = tiny(), Hooks()
    trainer = trainer_of(tmp_path, model, [hooks], max_steps=9, logging_steps=2)
    trainer.add_callback(SleepMonitor(trainer, every=2))
    trainer.train()
    assert hooks.watched == (0, 0, 1, 1, 0, 0, 1, 1, 0)
    assert [entry["step"] for entry in measurements(trainer) if "gradient_norm_pass_2" in entry] == [4, 8]
    assert not model._pass_hooks


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_nothing_of_a_step_outlives_it(eviction, checkpointing, tmp_path):
    """A hook on a tensor that holds the tensor is a cycle which no collector sees: the graph would stay forever."""
    model = tiny(eviction=eviction, sleep_passes=3)
    callbacks = [NonFiniteGuard(), SleepPassesSchedule(1, 3, seed=0)]
    trainer = trainer_of(tmp_path, model, callbacks, max_steps=5, **{CHECKPOINTING: checkpointing})
    trainer.add_callback(SleepMonitor(trainer, every=1))
    left = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            gc.collect()
            left.append(sum(type(thing) is torch.Tensor and thing.grad_fn is not None for thing in gc.get_objects()))

    trainer.add_callback(Count())
    trainer.train()
    assert len(left) == 5
    assert set(left) == {left[0]}
    assert any("gradient_norm_pass_3" in entry for entry in measurements(trainer))


@pytest.mark.parametrize("between", ["gate", "none"])
@pytest.mark.parametrize("passes", [1, 3])
def test_what_each_pass_made_is_measured(passes, between, tmp_path):
    """Against what goes into the first looped layer and comes out of the last; rows of different lengths."""
    rows = [{"input_ids": tokens(n, n).tolist(), "labels": tokens(n, n).tolist()} for n in (11, 4, 8)]
    model = tiny(sleep_passes=passes, between=between, loop_layers=(1, 3))
    fields = {
        "max_steps": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-9,
        "muon_learning_rate": None,
    }
    trainer = monitored(tmp_path, model, rows, **fields | {"weight_decay": 0.0, "gate_learning_rate": 1e-9})
    measured, numbers = measurements(trainer)[0], range(1, passes + 1)
    expected = {f"{name}_pass_{n}": [] for n in numbers for name in ("fast_weight_norm", "change")}
    read, made = [], []
    model.lm.model.layers[1].register_forward_pre_hook(lambda module, args: read.append(args[0]))
    model.fast_weights["2"].register_forward_hook(lambda module, args, output: made.append(output[0]))
    for row in (rows[0], rows[2]):  # one window each, slept on before the token after it
        for n in numbers:
            read.clear()
            made.clear()
            with torch.no_grad():
                cache = SleepCache()
                model.eval()(torch.tensor([row["input_ids"][:6]]), cache=cache)
                model.sleep(cache, sleep_passes=n)
            state = cache.memory.carried[sorted(cache.fast_slots)[1]][0]
            expected[f"fast_weight_norm_pass_{n}"] += state.norm(dim=(-2, -1)).flatten().tolist()
            expected[f"change_pass_{n}"] += (made[-1].norm(dim=-1) / read[0].norm(dim=-1)).flatten().tolist()
    if between == "none":
        expected = {name: values for name, values in expected.items() if not name.startswith("change")}
        assert "gate_mean" not in measured
    else:
        assert measured["gate_mean"] == pytest.approx(model.between.gate.mean().item())
        assert measured["gate_max"] == pytest.approx(model.between.gate.abs().max().item()) != measured["gate_mean"]
    assert {name for name in measured if "_pass_" in name and "gradient" not in name} == set(expected)
    for name, values in expected.items():
        assert measured[name] == pytest.approx(sum(values) / len(values), rel=1e-4), name
    assert len({round(measured[name], 6) for name in expected}) == len(expected)


def test_pads_are_no_part_of_what_a_pass_changes():
    model, rows = tiny(between="gate"), [{"input_ids": tokens(n, n).tolist()} for n in (5, 3)]
    found = []
    for batch in ([rows[0]], [rows[1]], rows):
        cache = SleepCache()
        with pass_sums(model) as sums, torch.no_grad():
            model(**SleepCollator()(batch), cache=cache)
            model.sleep(cache, sleep_passes=3)
        found.append(sums)
    assert not model._pass_hooks
    assert found[2]["change_pass_3"][1] == 8
    for name, (total, count) in found[2].items():
        assert total == pytest.approx(found[0][name][0] + found[1][name][0], rel=1e-5)
        assert count == found[0][name][1] + found[1][name][1]


def test_the_gate_of_an_adapter_s_model_is_measured(tmp_path):
    model = tiny(between="gate")
    measured = measurements(monitored(tmp_path, get_peft_model(model, sleep_lora_config(model)), max_steps=1))[0]
    assert measured["gate_max"] > 0
    assert measured["change_pass_2"] > 0


def test_more_passes_are_more_of_the_time(tmp_path):
    shares = []
    for passes in (1, 8):
        trainer = monitored(tmp_path, tiny(sleep_passes=passes), max_steps=5)
        shares.append(sorted(entry["sleep_share"] for entry in measurements(trainer))[2])
        assert all(entry["sleep_seconds"] > 0 for entry in measurements(trainer))
    assert shares[0] < 0.3 < 0.6 < shares[1] < 1


@pytest.mark.parametrize("plain", [True, False])
def test_the_monitor_reports_now_and_then_and_changes_nothing(plain, tmp_path):
    class Reported(TrainerCallback):
        steps = ()

        def on_log(self, args, state, control, logs=None, model=None, **kwargs):
            if "fast_weight_norm" in logs:
                assert model.training
                self.steps = (*self.steps, state.global_step)

    free = trainer_of(tmp_path, tiny(), plain=plain, max_steps=7)
    free.train()
    watched, reported = trainer_of(tmp_path, tiny(), plain=plain, max_steps=7), Reported()
    watched.add_callback(reported)
    watched.add_callback(SleepMonitor(watched, every=3))
    watched.train()
    assert reported.steps == (3, 6)
    assert losses(watched) == losses(free)
    assert not changed(watched.model, weights(free.model))
    assert not watched.model._forward_pre_hooks


@pytest.mark.parametrize("family", ["jet_nemotron", "qwen3_next", "ouro"])
def test_the_monitor_knows_every_kind_of_fast_weight(family, tmp_path):
    measured = measurements(monitored(tmp_path, tiny(family), max_steps=1))[0]
    assert all(math.isfinite(value) for value in measured.values())
    assert 0 < measured["mean_decay"] < 1
    assert measured["fast_weight_rank"] > 1


def test_the_monitor_reads_its_rows_once_and_as_the_model_does(tmp_path):
    """Rows of different lengths: none sleeps on its last window, and all the others are slept on."""
    model, batch = tiny(sleep_passes=3), SleepCollator("left")([{"input_ids": tokens(n, n).tolist()} for n in (20, 8)])
    batch["labels"] = batch["input_ids"]
    monitor, slept = SleepMonitor(trainer_of(tmp_path, model)), []
    monitor._keep_batch(model.train(), (), batch)
    model.on_sleep(lambda event: slept.append((event.row, event.tokens)))
    with gates() as measured:
        metrics = monitor.measure(model)
    assert sorted(slept) == [(0, 6), (0, 12), (0, 18), (1, 6)]
    slept.clear()
    with gates() as read, torch.no_grad():
        model.eval()(**batch)
    assert len(slept) == 4
    for name, (total, count) in read.items():
        assert measured[name] == [pytest.approx(total, rel=1e-5), count]
        assert metrics[name] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_monitor_sleeps_as_training_does(bf16, tmp_path):
    model, seen = tiny(sleep_passes=3), []
    trainer = trainer_of(tmp_path, model, bf16=bf16, max_steps=1)
    trainer.add_callback(SleepMonitor(trainer, every=1))
    block = next(iter(model.fast_weights.values()))
    block.register_forward_pre_hook(lambda *_: seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))))
    trainer.train()
    assert {grad for grad, _ in seen} == {True, False}
    assert {autocast for _, autocast in seen} == {bf16}


# Generated answers.


def answered(model, rows, passes):
    """The naive twin: one row at a time, token by token from the whole text."""
    right = {}
    for row in rows:
        first = next(i for i, label in enumerate(row["labels"]) if label != -100)
        ids, answer = list(row["input_ids"][:first]), [label for label in row["labels"] if label != -100]
        for _ in answer:
            with torch.no_grad():
                ids.append(model.eval()(torch.tensor([ids]), sleep_passes=passes).logits[0, -1].argmax().item())
        right.setdefault(row["difficulty"], []).append(ids[first:] == answer)
    return {difficulty: sum(hits) / len(hits) for difficulty, hits in right.items()}


def test_generated_answers_by_difficulty_and_n(tmp_path):
    model, rows = tiny(sleep_passes=2), []
    for i, length in enumerate((5, 17, 11, 8, 14, 13)):
        prompt = tokens(length, seed=i)[None]
        passes = (2, 4)[i // 3]
        answer = model.generate(prompt, max_new_tokens=2 + i % 2, sleep_passes=passes)[0, length:].tolist()
        if i == 1:
            answer[-1] = (answer[-1] + 1) % 61
        ids = prompt[0].tolist() + answer
        rows.append({"input_ids": ids, "labels": [-100] * length + answer, "difficulty": i % 3})
    twins = {passes: answered(model, rows, passes) for passes in (2, 4)}
    assert twins[2] != twins[4]
    assert all(0 < sum(twin.values()) < 3 for twin in twins.values())
    trainer = trainer_of(tmp_path, model, eval_dataset=TASK.dataset(4))
    trainer.add_callback(GenerationEvaluation(trainer, rows, (2, 4), batch_size=4))
    metrics = trainer.evaluate()
    for passes, twin in twins.items():
        for difficulty, score in twin.items():
            assert metrics[f"eval_generate_accuracy_{difficulty}_passes_{passes}"] == score
        assert metrics[f"eval_generate_accuracy_passes_{passes}"] == pytest.approx(sum(twin.values()) / 3)
    assert trainer.state.log_history[-1]["eval_generate_accuracy_passes_4"] == sum(twins[4].values()) / 3
    assert model.config.sleep.sleep_passes == 2


def test_prompts_are_slept_on_where_their_rows_say(tmp_path):
    model, rows, plain = tiny(), [], 0
    for i, length in enumerate((5, 17, 11, 9)):
        prompt = tokens(length, seed=i)[None]
        marks = torch.tensor([[int(j in (1, length - 1)) for j in range(length)]])
        answer = model.generate(prompt, sleep_after=marks, max_new_tokens=3)[0, length:].tolist()
        plain += model.generate(prompt, max_new_tokens=3)[0, length:].tolist() == answer
        pads = {"attention_mask": [0] + [1] * (length + 3), "sleep_after": [0, *marks[0].tolist(), 1, 0, 0]}
        rows.append({"input_ids": [7, *prompt[0].tolist(), *answer], "labels": [-100] * (length + 1) + answer} | pads)
    assert plain < 4
    trainer = trainer_of(tmp_path, model, eval_dataset=TASK.dataset(4))
    trainer.add_callback(GenerationEvaluation(trainer, rows, (2,)))
    assert trainer.evaluate()["eval_generate_accuracy_passes_2"] == 1.0
    with pytest.raises(ValueError, match="prompt_ids and sleep_after"):
        GenerationEvaluation(trainer, [{"prompt_ids": [1]} | rows[0]], (2,))


def test_rows_without_a_difficulty_have_one_mean(tmp_path):
    model, rows = tiny(), []
    for i, length in enumerate((5, 17, 11)):
        answer = model.generate(tokens(length, seed=i)[None], max_new_tokens=2)[0, length:].tolist()
        answer[-1] = (answer[-1] + (i == 1)) % 61
        rows.append({"prompt_ids": tokens(length, seed=i).tolist(), "labels": answer})
    trainer = trainer_of(tmp_path, model, eval_dataset=TASK.dataset(4))
    trainer.add_callback(GenerationEvaluation(trainer, rows, (2,)))
    metrics = trainer.evaluate()
    made = {name: value for name, value in metrics.items() if "generate" in name}
    assert made == {"eval_generate_accuracy_passes_2": pytest.approx(2 / 3)}
    for some in ([rows[0], rows[1] | {"difficulty": 1}], []):
        with pytest.raises(ValueError, match=rf"of the {len(some)} rows {len(some) // 2} have a difficulty"):
            GenerationEvaluation(trainer, some, (2,))


def test_callbacks_that_log_ask_for_the_trainer():
    for make in (SleepMonitor, lambda: SleepMonitor(tiny()), lambda: GenerationEvaluation(None, [], (1,))):
        with pytest.raises(TypeError, match=r"needs the trainer whose log reports it.*trainer\.add_callback\("):
            make()


def test_a_row_may_bring_its_prompt(tmp_path):
    model = tiny()
    answer = model.generate(tokens(9)[None], max_new_tokens=3)[0, 9:].tolist()
    row = {"prompt_ids": tokens(9).tolist(), "labels": answer, "difficulty": 5}
    trainer = trainer_of(tmp_path, model, eval_dataset=TASK.dataset(4), plain=True)
    trainer.add_callback(GenerationEvaluation(trainer, [row], (2,)))
    assert trainer.evaluate()["eval_generate_accuracy_5_passes_2"] == 1.0
    # What the base would rather do than decode greedily is set aside, and is there again.
    model.generation_config.update(suppress_tokens=answer[:1], num_beams=3)
    assert model.generate(tokens(9)[None], max_new_tokens=3)[0, 9:].tolist() != answer
    assert trainer.evaluate()["eval_generate_accuracy_5_passes_2"] == 1.0
    assert model.generation_config.num_beams == 3


def test_an_adapter_s_model_keeps_its_generation_config(tmp_path):
    model = tiny()
    model.generation_config.update(repetition_penalty=1.7, eos_token_id=60)
    before, own = model.generation_config.to_dict(), model.generation_config
    adapted = get_peft_model(model, sleep_lora_config(model))
    others = [m for m in adapted.modules() if "generation_config" in vars(m)]
    configs = [m.generation_config for m in others]
    trainer = trainer_of(tmp_path, adapted, eval_dataset=TASK.dataset(4))
    trainer.add_callback(GenerationEvaluation(trainer, [{"prompt_ids": [1, 2, 3], "labels": [4, 5]}], (2,)))
    assert "eval_generate_accuracy_passes_2" in trainer.evaluate()
    assert [m for m in adapted.modules() if "generation_config" in vars(m)] == others
    assert all(m.generation_config is config for m, config in zip(others, configs, strict=True))
    assert adapted.generation_config is own
    assert adapted.merge_and_unload().generation_config.to_dict() == before


def test_a_row_s_own_pads_are_no_part_of_its_prompt(tmp_path):
    model = tiny()
    prompt = tokens(9).tolist()
    answer = model.generate(tokens(9)[None], max_new_tokens=3, do_sample=False)[0, 9:].tolist()
    row = {"input_ids": [0, 0, *prompt, *answer], "labels": [-100] * 11 + answer, "attention_mask": [0, 0] + [1] * 12}
    trainer = trainer_of(tmp_path, model, eval_dataset=TASK.dataset(4))
    trainer.add_callback(GenerationEvaluation(trainer, [row | {"difficulty": 5}], (2,)))
    assert trainer.evaluate()["eval_generate_accuracy_5_passes_2"] == 1.0


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [1, 2, 3], "labels": [-100] * 3},
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3]},
        {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4]},
        KHop(num_nodes=5, hops=(1,)).example(0),
    ],
)
def test_rows_that_no_text_can_answer_are_refused(row, tmp_path):
    trainer = trainer_of(tmp_path)
    with pytest.raises(ValueError, match="labels must be one answer, token after token"):
        GenerationEvaluation(trainer, [{"difficulty": 1} | row], (1,))


def test_the_best_model_may_be_chosen_by_what_it_generates(tmp_path):
    fields = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": TASK.dataset(4), "save_strategy": "best"}
    fields |= {"metric_for_best_model": "generate_accuracy_passes_2", "greater_is_better": True}
    trainer = trainer_of(tmp_path, **fields)
    trainer.add_callback(GenerationEvaluation(trainer, TASK.dataset(4), (2,)))
    trainer.train()
    assert trainer.state.best_metric is not None
    assert isinstance(trainer.optimizer.optimizer, MuonAdamW)
