"""Distillation from a model's own base: the teacher is the base with everything in context, and the loss a formula."""

import copy

import pytest
import torch
import torch.nn.functional as F
from families import VOCAB, make_base, make_model, sleep_config, tokens
from helpers import QUIET, assert_close, pad, weights
from peft import get_peft_model

from hf_sleep import sleep_lora_config
from hf_sleep.compat import CHECKPOINTING
from hf_sleep.training import (
    Distillation,
    DistillationTrainer,
    HardEvictionWarmup,
    SleepCollator,
    SleepTrainer,
    SleepTrainingArguments,
    Teacher,
    WindowsCurriculum,
    freeze_all_but_fast_weights,
)
from hf_sleep.training import distillation as module
from hf_sleep.training.distillation import recurring

L = 6
LENGTHS = (20, 7, 26, 13)
ROWS = [
    {"input_ids": (ids := tokens(n, seed=n).tolist()), "labels": [-100] * (n // 3) + ids[n // 3 :]} for n in LENGTHS
]
EXACT = {"muon_learning_rate": None, "learning_rate": 1e-2, "max_grad_norm": 1e9, "warmup_steps": 0, "weight_decay": 0}


def tiny(family="llama", dtype=torch.float64, **fields):
    return make_model(family, sleep_config(family, **{"window_size": L} | fields), dtype)


def trainer_of(path, model, distillation=None, callbacks=(), collator=None, kind=DistillationTrainer, **fields):
    settings = QUIET | {"train_sampling_strategy": "sequential", "max_steps": 1} | EXACT | fields
    own = {"distillation": distillation} if kind is DistillationTrainer else {}
    return kind(
        model,
        SleepTrainingArguments(path, **settings),
        collator or SleepCollator(),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        callbacks=list(callbacks),
        **own,
    )


def logged(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# The formula.


def kl_over_likely(theirs, ours, k):
    """KL in nats of two lists of log-probabilities, over the k likeliest of `theirs` and all others together."""
    p, q = theirs.exp(), ours.exp()
    likely = theirs.topk(k).indices
    total = (p[likely] * (theirs[likely] - ours[likely])).sum()
    if k == VOCAB:
        return total
    rest, our_rest = 1 - p[likely].sum(), 1 - q[likely].sum()
    return total + rest * (rest.log() - our_rest.log())


def again(ids, i, n, distance):
    """Whether the n tokens up to i stood before, and not within `distance`."""
    span = ids[i - n + 1 : i + 1]
    ends = [j for j in range(n - 1, i) if ids[j - n + 1 : j + 1] == span] if i >= n - 1 else []
    return bool(ends) and i - ends[-1] > distance


def naive(model, base, rows, settings):
    """The mean loss over all targets, from whole logits, row by row and token by token."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            theirs = base(input_ids=ids).logits[0].log_softmax(-1)
        ours = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        targets = [i for i in range(1, ids.shape[1]) if row["labels"][i] != -100]
        heavy = {
            i: settings.recurring_weight for i in targets if again(row["input_ids"], i, settings.recurring_tokens, L)
        }
        mean = sum(heavy.get(i, 1.0) for i in targets) / max(1, len(targets))
        for i in targets:
            kl = kl_over_likely(theirs[i - 1], ours[i - 1], settings.top_k or VOCAB)
            each = -(1 - settings.share) * ours[i - 1, row["labels"][i]] + settings.share * kl
            total = total + heavy.get(i, 1.0) / mean * each
        count += len(targets)
    return total / count


def repeating():
    """Rows in which spans recur, near and far."""
    rows = []
    for n, seed in ((30, 1), (24, 2)):
        ids = tokens(n, seed=seed).tolist()
        ids[n - 8 : n - 2] = ids[1:7]
        ids[10:13] = ids[7:10]
        rows.append({"input_ids": ids, "labels": list(ids)})
    return rows


@pytest.mark.parametrize(
    ("settings", "family"),
    [
        (Distillation(), "llama"),
        (Distillation(share=1.0, top_k=0), "llama"),
        (Distillation(share=0.3, top_k=5, chunk_tokens=7), "granite"),
        (Distillation(share=0.0, recurring_weight=3.0), "llama"),
        (Distillation(share=0.5, top_k=VOCAB, recurring_weight=4.0, recurring_tokens=3), "gemma3"),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_a_naive_formula(settings, family, side, tmp_path):
    model, base = tiny(family, sleep_passes=2), make_base(family, torch.float64)
    rows = repeating() if settings.recurring_weight != 1 else ROWS
    expected = naive(model, base, rows, settings)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    trainer = trainer_of(tmp_path, model, settings)
    loss = trainer.compute_loss(model.train(), SleepCollator(side)(rows))
    loss.backward()
    tolerance = (
        1e-9 if settings.recurring_weight == 1 and family != "gemma3" else 1e-5
    )  # weights are float32, as are norms
    assert_close(loss.detach(), expected.detach(), tolerance, "loss")
    assert any(g.abs().max() > 1e-3 for name, g in gradients.items() if name.startswith("fast_weights"))
    for name, gradient in gradients.items():
        assert_close(model.get_parameter(name).grad, gradient, tolerance, name)


def test_all_tokens_told_apart_are_the_whole_divergence(tmp_path):
    logits, theirs = torch.randn(2, 9, VOCAB, dtype=torch.float64), torch.randn(2, 9, VOCAB, dtype=torch.float64)
    full = F.kl_div(logits.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    found = {}
    rows, columns = torch.ones(2, 9).nonzero(as_tuple=True)
    for k in (VOCAB, 40, 8, 1):
        log_p, ids = theirs.log_softmax(-1).flatten(0, 1).topk(k)
        said = module.Said(torch.arange(18).view(2, 9), ids, log_p, module.log_rest(log_p))
        found[k] = said.divergence(logits.flatten(0, 1), logits.flatten(0, 1).logsumexp(-1), rows, columns)
    assert_close(found[VOCAB], full.flatten(), 1e-12)
    # Less is told apart: never more, and with one token clearly less.
    assert bool((found[40] <= full.flatten() + 1e-12).all())
    assert bool((found[8] <= found[40] + 1e-12).all())
    assert found[1].mean() < 0.5 * full.mean()


@pytest.mark.parametrize("certain", [0.0, 30.0, 200.0])
def test_a_student_that_is_sure_has_a_finite_loss(certain):
    logits = torch.zeros(1, VOCAB, requires_grad=True)
    theirs = torch.zeros(1, VOCAB).log_softmax(-1)
    log_p, ids = theirs.topk(3)
    said = module.Said(torch.zeros(1, 1, dtype=torch.long), ids, log_p, module.log_rest(log_p))
    sharp = logits + certain * F.one_hot(ids[:, 0], VOCAB)
    zero = torch.zeros(1, dtype=torch.long)
    loss = said.divergence(sharp, sharp.logsumexp(-1), zero, zero).sum()
    loss.backward()
    assert loss.isfinite()
    assert bool(logits.grad.isfinite().all())
    assert loss.item() == pytest.approx(0, abs=1e-5) or certain


# The teacher.


@pytest.mark.parametrize("family", ["llama", "gemma3", "granite", "qwen3_next", "jet_nemotron", "ouro"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_teacher_is_the_base_with_everything_in_context(family, side):
    model = tiny(family, torch.float32)
    ids, mask = pad([tokens(n, seed=n) for n in LENGTHS], side)
    if family == "ouro":
        model.lm.config.total_ut_steps = 3
    said = Teacher(freeze(model), top_k=9, chunk_tokens=5).read(ids, mask, mask)
    for b, n in enumerate(LENGTHS):
        with torch.no_grad():
            log_p = model.lm(input_ids=tokens(n, seed=n)[None]).logits[0].log_softmax(-1)
        at = said.index[b][mask[b] != 0]
        assert_close(said.log_p[at], log_p.gather(-1, said.ids[at]), 1e-4)
        assert_close(said.log_p[at], log_p.topk(9).values, 1e-4)
        assert_close(said.log_rest[at], (1 - log_p.topk(9).values.exp().sum(-1)).log(), 1e-3)


def freeze(model):
    freeze_all_but_fast_weights(model)
    return model


def test_a_student_with_everything_in_context_has_nothing_to_learn(tmp_path):
    model = make_model("llama", sleep_config("llama", window_size=64), torch.float64, trained=False)
    trainer = trainer_of(tmp_path, model, Distillation(share=1.0, top_k=7))
    batch = SleepCollator("left")(ROWS)
    loss = trainer.compute_loss(model.train(), batch)
    loss.backward()
    assert abs(loss.item()) < 1e-9
    assert all(p.grad is None or p.grad.abs().max() < 1e-9 for p in model.parameters())
    with model.sleeping(window_size=L):
        assert trainer.compute_loss(model, batch) > 0.1


def test_logits_are_made_a_few_at_a_time(tmp_path, monkeypatch):
    """Neither teacher nor student ever makes those of whole rows."""
    model, widest = tiny().train(), []
    decoder = type(model.decoder)
    logits = decoder.logits
    monkeypatch.setattr(decoder, "logits", lambda self, x: widest.append(x.shape[:-1].numel()) or logits(self, x))
    trainer = trainer_of(tmp_path, model, Distillation(chunk_tokens=3))
    trainer.token_loss(SleepCollator()(ROWS))
    targets = sum(label != -100 for row in ROWS for label in row["labels"])
    assert max(widest) == 3
    assert sum(widest) == targets
    widest.clear()
    trainer.distillation = Distillation(share=0.0)
    trainer.compute_loss(model, SleepCollator()(ROWS))
    assert max(widest) <= len(ROWS) * L


def test_what_is_trained_in_the_base_is_taught_by_a_copy(tmp_path):
    whole, blocks = tiny(), freeze(tiny())
    before = weights(whole.lm)
    trainer = trainer_of(tmp_path, whole, max_steps=2)
    trainer.train()
    assert trainer.teacher.is_copy
    assert all(torch.equal(trainer.teacher.lm.state_dict()[name], value) for name, value in before.items())
    assert not torch.equal(whole.lm.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
    assert not any(p.requires_grad for p in trainer.teacher.lm.parameters())
    shared = Teacher(blocks)
    assert shared.lm is blocks.lm
    assert Teacher(blocks, copied=True).lm is not blocks.lm


def test_a_hybrid_whose_own_layers_are_trained_is_copied():
    assert Teacher(freeze(tiny("qwen3_next"))).is_copy


def test_a_teacher_has_no_adapter_and_no_dropout():
    model = tiny()
    ids, mask = pad([tokens(n, seed=n) for n in LENGTHS], "right")
    plain = Teacher(freeze(tiny())).read(ids, mask, mask)
    model.lm.config.attention_dropout = 0.5
    for layer in model.lm.model.layers:
        layer.self_attn.attention_dropout = 0.5
    adapted = get_peft_model(model, sleep_lora_config(model, r=2, lora_dropout=0.5, init_lora_weights=False)).train()
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    said = Teacher(adapted).read(ids, mask, mask)
    assert torch.equal(said.log_p, plain.log_p)
    assert adapted.training
    assert all(layer.training for layer in model.lm.modules())
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == trained
    with pytest.raises(ValueError, match="an adapter lies in the base's layers"):
        Teacher(adapted, copied=True)


def test_a_teacher_leaves_a_frozen_adapter_frozen():
    model = tiny()
    adapted = freeze(get_peft_model(model, sleep_lora_config(model, r=2)))
    next(iter(model.fast_weights.parameters())).requires_grad_(False)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    teacher = Teacher(adapted)
    assert [name for name, p in adapted.named_parameters() if p.requires_grad] == trained
    ids = tokens(9)[None]
    teacher.read(ids, None, torch.ones_like(ids))
    assert [name for name, p in adapted.named_parameters() if p.requires_grad] == trained


@pytest.mark.parametrize(("steps", "is_trained"), [(2, False), (1, True)])
def test_the_first_stage_of_an_adapter_trains_the_fast_weights_alone(steps, is_trained, tmp_path):
    model = tiny(dtype=torch.float32)
    adapted = get_peft_model(model, sleep_lora_config(model, r=2))
    before = weights(adapted)
    trainer_of(tmp_path, adapted, callbacks=[HardEvictionWarmup(steps=steps)], max_steps=2).train()
    changed = {name for name, value in weights(adapted).items() if not torch.equal(value, before[name])}
    assert any("fast_weights" in name for name in changed)
    assert any("lora_" in name for name in changed) is is_trained


# Weights.


def test_a_teacher_reads_no_further_than_its_positions():
    model = tiny("llama")
    most = model.config.text_config.max_position_embeddings
    ids = torch.zeros(1, most + 1, dtype=torch.long)
    with pytest.raises(ValueError, match=f"rows have {most + 1} columns, and the base has {most} positions"):
        Teacher(model).read(ids, None, ids == 1)


def test_spans_recur_when_their_last_occurrence_is_far():
    ids = [1, 2, 3, 9, 9, 9, 1, 2, 3, 4, 1, 2, 3]
    assert [i for i, found in enumerate(recurring(ids, 3, 5)) if found] == [8]
    assert [i for i, found in enumerate(recurring(ids, 2, 3)) if found] == [7, 8, 11, 12]
    assert [i for i, found in enumerate(recurring(ids, 3, 6)) if found] == []
    assert not any(recurring([1, 2], 3, 1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_weights_have_a_mean_of_one_in_every_row(side, tmp_path):
    trainer = trainer_of(tmp_path, freeze(tiny()), Distillation(recurring_weight=5.0, recurring_tokens=2))
    rows = repeating()
    rows[0]["labels"] = rows[0]["labels"][:25] + [-100] * 5
    batch = SleepCollator(side)(rows)
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
    weight = trainer._weights(batch["input_ids"], batch["attention_mask"], targets)
    assert bool((weight[~targets] == 0).all())
    for r, row in enumerate(rows):
        at = weight[r][targets[r]]
        assert at.mean().item() == pytest.approx(1, abs=1e-6)
        heavy = [again(row["input_ids"], i, 2, L) for i in range(1, len(row["labels"])) if row["labels"][i] != -100]
        assert any(heavy)
        assert at.tolist() == pytest.approx([(5.0 if h else 1.0) * at.min().item() for h in heavy], rel=1e-6)


# Training.


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_batches_are_one_batch(checkpointing, tmp_path):
    settings, after = Distillation(share=0.4, top_k=6, recurring_weight=3.0, recurring_tokens=1), []
    for size in (4, 1):
        model = tiny(dtype=torch.float32, sleep_passes=2)
        fields = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 2}
        trainer = trainer_of(tmp_path, model, settings, **fields, **{CHECKPOINTING: checkpointing})
        trainer.train()
        after.append((logged(trainer), logged(trainer, "grad_norm")))
    for losses, norms in after[1:]:
        assert losses == pytest.approx(after[0][0], rel=1e-4)
        assert norms == pytest.approx(after[0][1], rel=1e-3)


def test_a_curriculum_cuts_what_the_teacher_reads_too(tmp_path):
    model, read = freeze(tiny()), []
    trainer = trainer_of(tmp_path, model, Distillation(share=0.5), [WindowsCurriculum({0: 2})], pass_states=1.0)
    inner = trainer.teacher.read
    trainer.teacher.read = lambda ids, mask, wanted: read.append(int(mask.sum(1).max())) or inner(ids, mask, wanted)
    trainer.args.max_steps = 2
    trainer.train()
    assert read == [2 * L, 2 * L]
    expected = naive(tiny(), make_base("llama", torch.float64), [cut(row) for row in ROWS], Distillation())
    assert logged(trainer)[0] == pytest.approx(expected.item(), rel=1e-5)


def cut(row):
    return {name: values[: 2 * L] for name, values in row.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_the_loss_is_made_of_is_logged(checkpointing, tmp_path):
    """Over everything since the last log, whatever the weights are."""
    model, base = freeze(tiny()), make_base("llama", torch.float64)
    settings = Distillation(share=0.3, top_k=5, recurring_weight=3.0, recurring_tokens=1)
    entropy, apart = (naive(model, base, ROWS, Distillation(share=share, top_k=5)).item() for share in (0.0, 1.0))
    fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-9}
    trainer = trainer_of(
        tmp_path, model, settings, max_steps=2, logging_steps=2, **fields, **{CHECKPOINTING: checkpointing}
    )
    trainer.train()
    assert logged(trainer, "cross_entropy") == [pytest.approx(entropy, rel=1e-5)]
    assert logged(trainer, "divergence") == [pytest.approx(apart, rel=1e-5)]
    alone = trainer_of(tmp_path, freeze(tiny()), Distillation(share=0.0), **fields)
    alone.train()
    assert logged(alone, "cross_entropy") == [pytest.approx(entropy, rel=1e-5)]
    assert not logged(alone, "divergence")


@pytest.mark.parametrize("made", ["blocks", "adapter", "whole"])
def test_it_trains_and_evaluation_is_cross_entropy(made, tmp_path):
    model = tiny(dtype=torch.float32)
    if made == "blocks":
        freeze(model)
    if made == "adapter":
        model = get_peft_model(model, sleep_lora_config(model, r=2))
    twin = copy.deepcopy(model)
    trainer = trainer_of(tmp_path, model, Distillation(share=1.0), max_steps=8, eval_on_start=True)
    trainer.train()
    losses = logged(trainer)
    assert losses[-1] < 0.7 * losses[0]
    plain = trainer_of(tmp_path, twin, kind=SleepTrainer).evaluate()["eval_loss"]
    assert logged(trainer, "eval_loss")[0] == pytest.approx(plain, rel=1e-6)
    assert losses[0] != pytest.approx(plain, rel=1e-2)


def test_without_a_share_it_is_the_plain_trainer(tmp_path):
    losses = []
    for kind in (DistillationTrainer, SleepTrainer):
        trainer = trainer_of(tmp_path, tiny(), Distillation(share=0.0), kind=kind, max_steps=2)
        trainer.train()
        losses.append(logged(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share": 1.5}, "Distillation.share=1.5"),
        ({"top_k": -1}, "Distillation.top_k"),
        ({"recurring_weight": 0.0}, "Distillation.recurring_weight=0.0"),
        ({"recurring_tokens": 0}, "Distillation.recurring_tokens"),
        ({"chunk_tokens": 0}, "Distillation.chunk_tokens"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**fields)


def test_label_smoothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1: the teacher"):
        trainer_of(tmp_path, tiny(), label_smoothing_factor=0.1)


def test_another_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="DistillationTrainer with a compute_loss_func: the loss is made of"):
        DistillationTrainer(
            tiny(), SleepTrainingArguments(tmp_path, **QUIET), compute_loss_func=lambda outputs, labels, **_: 0
        )


def test_a_batch_that_the_teacher_cannot_read_is_named(tmp_path):
    def collate(rows):
        batch = SleepCollator()(rows)
        return {name: value for name, value in batch.items() if name != "labels"}

    with pytest.raises(ValueError, match=r"a batch has \['attention_mask', 'input_ids'\], and no labels"):
        trainer_of(tmp_path, tiny(), Distillation(share=0.5), collator=collate).train()
