"""WindowsCurriculum: which windows of which rows a step trains on, cut before the labels are counted."""

import random
import shutil
from itertools import chain, product

import pytest
import torch
import torch.nn.functional as F
from families import make_model, sleep_config, tokens
from helpers import QUIET, pad, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_sleep import SleepCache
from hf_sleep.data import KHop
from hf_sleep.training import (
    SleepCollator,
    SleepPassesSchedule,
    SleepTrainer,
    SleepTrainingArguments,
    WindowsCurriculum,
)
from hf_sleep.training.windows import cut_rows, window_numbers

L = 6
STAGES = {0: 1, 2: 2, 3: 4}


def tiny(seed=0, **fields):
    return make_model("llama", sleep_config("llama", **{"window_size": L} | fields), seed=seed)


def text(n=24, most=40):
    """Rows of different lengths, with labels everywhere."""
    lengths = [8 + (7 * i) % (most - 8) for i in range(n)]
    return [{"input_ids": (ids := tokens(length, seed=i).tolist()), "labels": ids} for i, length in enumerate(lengths)]


def trainer_of(path, callbacks=(), rows=None, model=None, collator=None, kind=SleepTrainer, **fields):
    arguments = SleepTrainingArguments if kind is SleepTrainer else TrainingArguments
    return kind(
        tiny() if model is None else model,
        arguments(path, **QUIET | {"max_steps": 5} | fields),
        collator or SleepCollator(),
        train_dataset=text() if rows is None else rows,
        eval_dataset=text(4),
        callbacks=list(callbacks),
    )


def logged(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class Seen(TrainerCallback):
    """Notes the most windows of a row, in every forward in training and in evaluation."""

    def __init__(self):
        self.training, self.evaluation = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def look(module, args, kwargs):
            most = int(kwargs["attention_mask"].sum(1).max())
            (self.training if module.training else self.evaluation).append(-(-most // L))

        model.register_forward_pre_hook(look, with_kwargs=True)


def naive_windows(length, flags, size):
    """The tokens of each window, told token by token."""
    windows = [[]]
    for i in range(length):
        if len(windows[-1]) == size or (windows[-1] and flags[i - 1]):
            windows.append([])
        windows[-1].append(i)
    return windows


# The number.


def test_the_number_is_that_of_the_stage():
    stages = WindowsCurriculum({0: 1, 500: 2, 900: 4})
    assert [stages.windows(step) for step in (0, 499, 500, 899, 900, 10**6)] == [1, 1, 2, 2, 4, 4]
    assert WindowsCurriculum([[900, 4], (0, 1), (500, 2)]).stages == stages.stages
    drawn = WindowsCurriculum({0: 2, 300: 4}, seed=1)
    numbers = [drawn.windows(step) for step in range(600)]
    assert set(numbers[:300]) == {2}
    assert all(80 < numbers[300:].count(n) < 120 for n in (2, 3, 4))
    assert numbers != [WindowsCurriculum({0: 2, 300: 4}, seed=2).windows(step) for step in range(600)]
    torch.manual_seed(5)
    assert numbers[::-1] == [drawn.windows(step) for step in reversed(range(600))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "must begin at step 0"),
        (({1: 1},), "must begin at step 0"),
        (({0: 2, 5: 1},), "may only rise"),
        (({0: 0},), "windows of a stage=0"),
        (({0: 1, 2.5: 2},), "step of a stage=2.5"),
        (({0: 1}, "middle"), "keep='middle': it must be one of"),
    ],
)
def test_stages_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=rf"WindowsCurriculum: .*{message}"):
        WindowsCurriculum(*arguments)


# The cut.


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("with_flags", [False, True])
def test_windows_are_the_whole_row_s(side, with_flags):
    rng = random.Random(3)
    rows = [tokens(rng.randint(1, 40), seed=i) for i in range(30)]
    flags = [torch.tensor([rng.random() < 0.2 for _ in row]).long() * with_flags for row in rows]
    ids, mask = pad(rows, side)
    marks = pad(flags, side, poison=1)[0]
    numbers = window_numbers(mask != 0, marks if with_flags else None, L)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    batch |= {"sleep_after": marks} if with_flags else {}
    for b, (row, own) in enumerate(zip(rows, flags, strict=True)):
        windows = naive_windows(len(row), own.tolist(), L)
        assert numbers[b][mask[b] != 0].tolist() == [w for w, window in enumerate(windows) for _ in window]
    for keep, n in product(("first", "last"), (1, 2, 4)):
        windows = [naive_windows(len(row), own.tolist(), L) for row, own in zip(rows, flags, strict=True)]
        kept = [list(chain(*(w[:n] if keep == "first" else w[-n:]))) for w in windows]
        some = [b for b, tokens_kept in enumerate(kept) if len(tokens_kept) > 1]  # one alone is not predicted
        cut = cut_rows({name: tensor[some] for name, tensor in batch.items()}, L, n, keep)
        assert cut["attention_mask"][:, [0, -1]].any(0).all()
        for r, b in enumerate(some):
            real = cut["attention_mask"][r] != 0
            assert cut["input_ids"][r][real].tolist() == rows[b][kept[b]].tolist()
            assert cut["labels"][r][real].tolist() == [-100, *rows[b][kept[b]][1:].tolist()]
            assert (cut["labels"][r][~real] == -100).all()
            if with_flags:
                left = flags[b][kept[b]]
                if keep == "first" and len(windows[b]) > n:
                    left[-1] = 0  # a window that is the last now does not sleep
                assert cut["sleep_after"][r][real].tolist() == left.tolist()
                assert not cut["sleep_after"][r][~real].any()


def test_rows_without_more_windows_and_without_a_mask():
    ids = torch.stack([tokens(3 * L + 2, seed=i) for i in range(2)])
    batch = {"input_ids": ids, "labels": ids, "token_type_ids": ids, "name": "x"}
    assert cut_rows(batch, L, 4, "first") == batch
    for keep, columns in (("first", slice(2 * L)), ("last", slice(2 * L, None))):
        cut = cut_rows(batch, L, 2, keep)
        assert cut["name"] == "x"
        assert torch.equal(cut["input_ids"], ids[:, columns])
        assert torch.equal(cut["token_type_ids"], ids[:, columns])
        assert cut["attention_mask"].all()
        assert torch.equal(cut["labels"][:, 1:], ids[:, columns][:, 1:])
        assert (cut["labels"][:, 0] == -100).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", ["first", "last"])
def test_a_cut_batch_computes_what_short_rows_do(side, keep):
    model, rows = tiny(sleep_passes=2).double().train(), text(6)
    cut = cut_rows(SleepCollator(side)(rows), L, 2, keep)
    short = []
    for row in rows:
        windows = naive_windows(len(row["labels"]), [0] * 40, L)
        kept = [row["input_ids"][i] for i in chain(*(windows[:2] if keep == "first" else windows[-2:]))]
        short.append({"input_ids": kept, "labels": kept})
    torch.testing.assert_close(model(**cut).loss, model(**SleepCollator()(short)).loss, rtol=1e-12, atol=0)


def test_a_row_without_a_label_left_is_refused(tmp_path):
    rows = [{"input_ids": [1] * 20, "labels": [-100] * 18 + [1, 1]}] * 4
    with pytest.raises(ValueError, match=r"row 0 .* 4 windows \(L=6\) and 2 labels, .* first 2 of .*keep='last'"):
        trainer_of(tmp_path, [WindowsCurriculum({0: 2})], rows).train()
    trainer_of(tmp_path, [WindowsCurriculum({0: 2}, keep="last")], rows).train()
    # Rows that had none before are not refused.
    batch = SleepCollator()([*rows[:1], {"input_ids": [1] * 20, "labels": [-100] * 20}])
    assert cut_rows(batch, L, 1, "last")["labels"].tolist() == [[-100, 1], [-100, -100]]


# In training.


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_are_cut_and_evaluation_is_not(accumulation, tmp_path):
    seen, rows = Seen(), text(40, most=40)
    fields = {"gradient_accumulation_steps": accumulation, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(tmp_path, [WindowsCurriculum(STAGES), seen], rows, **fields)
    trainer.train()
    assert seen.training == [n for n in (1, 1, 2, 4, 4) for _ in range(accumulation)]
    assert set(seen.evaluation) == {-(-max(len(row["labels"]) for row in text(4)) // L)}
    assert logged(trainer, "num_input_tokens_seen")[0] == 4 * accumulation * L


def test_a_stage_trains_as_short_rows_do(tmp_path):
    """Loss, counts and weights, over several batches per step, whose labels are counted together."""
    fields = {"gradient_accumulation_steps": 2, "max_steps": 3, "train_sampling_strategy": "sequential"}
    rows = text()
    short = [{name: ids[: 2 * L] for name, ids in row.items()} for row in rows]
    cut = trainer_of(tmp_path, [WindowsCurriculum({0: 2})], rows, collator=SleepCollator("left"), **fields)
    twin, uncut = trainer_of(tmp_path, (), short, **fields), trainer_of(tmp_path, (), rows, **fields)
    for trainer in (cut, twin, uncut):
        trainer.train()
    assert logged(cut) == pytest.approx(logged(twin), rel=1e-5)
    assert logged(cut) != pytest.approx(logged(uncut), rel=1e-2)
    for name, tensor in weights(cut.model).items():
        torch.testing.assert_close(tensor, twin.model.state_dict()[name], rtol=1e-4, atol=1e-5)


def unspread(batch, windows):
    """k-hop's edges, in fewer windows: those of KHop(windows=4) as KHop(windows=`windows`) has them."""
    task, width = KHop(5, windows=windows), KHop(5).window_size
    rows = {"input_ids": [], "labels": []}
    for ids in batch["input_ids"].tolist():
        edges = [token for token in ids[:-width] if token != task.fill_token]
        laid = []
        for w in range(windows):
            part = edges[5 * w // windows : 5 * (w + 1) // windows]
            laid += part + [task.fill_token] * (width - len(part))
        rows["input_ids"].append(laid + ids[-width:])
    rows["labels"] = [[-100] * (windows * width) + labels[-width:] for labels in batch["labels"].tolist()]
    return {name: torch.tensor(values) for name, values in rows.items()}


def test_a_function_lays_rows_out_again(tmp_path):
    """As the task with fewer windows has them, to the last digit."""
    fields = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    model = {"window_size": KHop(5).window_size}
    rows = {w: KHop(5, windows=w).dataset(8) for w in (2, 4)}
    cut = trainer_of(tmp_path, [WindowsCurriculum({0: 2}, unspread)], rows[4], tiny(**model), **fields)
    twin = trainer_of(tmp_path, (), rows[2], tiny(**model), **fields)
    for trainer in (cut, twin):
        trainer.train()
    assert logged(cut) == logged(twin)
    assert all(torch.equal(tensor, twin.model.state_dict()[name]) for name, tensor in weights(cut.model).items())


@pytest.mark.parametrize("arguments", [(STAGES,), ({0: 1, 1: 4}, "last", 3), ({0: 1, 2: 2}, unspread)])
def test_a_resumed_run_continues_and_another_curriculum_is_refused(arguments, tmp_path):
    function = unspread in arguments
    size = KHop(5).window_size if function else L
    rows = KHop(5, windows=4).dataset(24) if function else None

    def of(path, *arguments, seed=0, **fields):
        callbacks = [SleepPassesSchedule(1, 2, steps=4), WindowsCurriculum(*arguments)]
        return trainer_of(path, callbacks, rows, tiny(seed, window_size=size), **fields)

    whole = of(tmp_path, *arguments, save_strategy="steps", save_steps=1)
    whole.train()
    for step in (2, 3):
        shutil.copytree(tmp_path / f"checkpoint-{step}", tmp_path / "again" / f"checkpoint-{step}")
        for more in ({}, {"restore_callback_states_from_checkpoint": True}):
            if more and function:
                continue
            resumed = of(tmp_path / "again", *arguments, seed=5, **more)
            resumed.train(resume_from_checkpoint=True)
            assert logged(resumed) == logged(whole)
            assert all(torch.equal(t, resumed.model.state_dict()[name]) for name, t in weights(whole.model).items())
    stages, *rest = arguments
    for other in ([{**stages, 4: 5}, *rest], [stages, *rest[:1], 7] if rest else [stages, "last"]):
        with pytest.raises(ValueError, match=r"was trained with .*WindowsCurriculum.*, this run has"):
            of(tmp_path / "other", *other).train(str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match=r"was trained with .*WindowsCurriculum"):
        trainer_of(tmp_path / "other", [SleepPassesSchedule(1, 2, steps=4)], rows, tiny(window_size=size)).train(
            str(tmp_path / "checkpoint-2")
        )


def test_many_stages_are_recorded_alike_before_and_after_resuming(tmp_path):
    """JSON sorts keys as text: 1000 before 900."""
    stages = {0: 1, 1: 2, 900: 3, 1000: 4}
    trainer_of(tmp_path, [WindowsCurriculum(stages)], max_steps=3, save_strategy="steps", save_steps=1).train()
    resumed = trainer_of(tmp_path, [WindowsCurriculum(stages)], max_steps=3, save_strategy="steps", save_steps=1)
    resumed.train(str(tmp_path / "checkpoint-1"))
    trainer_of(tmp_path, [WindowsCurriculum(stages)], max_steps=3).train(str(tmp_path / "checkpoint-2"))


def test_a_trainer_that_does_not_cut_is_refused(tmp_path):
    curriculum = WindowsCurriculum({0: 1})
    trainer_of(tmp_path, [curriculum], max_steps=1).train()
    model = tiny()
    before = weights(model)
    plain = trainer_of(tmp_path, [curriculum], model=model, kind=Trainer)
    with pytest.raises(ValueError, match="Only a SleepTrainer cuts them"):
        plain.train()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


# A column that says where rows sleep.


def marked(n=8):
    """Rows of different lengths, with a mark somewhere in the first two windows and at the end of some."""
    rows = text(n)
    for i, row in enumerate(rows):
        length = len(row["labels"])
        row["sleep_after"] = [int(j in (2 + i % 5, 7) or (j == length - 1 and i % 2 == 1)) for j in range(length)]
    return rows


def loss_in_pieces(model, rows):
    """Each row read up to every mark, with `sleep()` between; the mean loss over all targets."""
    losses = []
    for row in rows:
        ids, cache, logits, first = torch.tensor([row["input_ids"]]), SleepCache(), [], 0
        for end in [i + 1 for i, mark in enumerate(row["sleep_after"]) if mark] + [ids.shape[1]]:
            if first < end:
                logits.append(model(ids[:, first:end], cache=cache).logits)
            if row["sleep_after"][end - 1]:
                model.sleep(cache)
            first = end
        losses.append(F.cross_entropy(torch.cat(logits, 1)[0, :-1], ids[0, 1:], reduction="sum"))
    return sum(losses) / sum(len(row["labels"]) - 1 for row in rows)


@pytest.mark.parametrize("side", ["left", "right"])
def test_training_with_marks_is_sleeping_between_the_pieces(side, tmp_path):
    rows = marked()
    fields = {"train_sampling_strategy": "sequential", "max_steps": 1, "max_grad_norm": 1e9}
    fields |= {"gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    trainer = trainer_of(tmp_path, (), rows, tiny(sleep_passes=2), SleepCollator(side), **fields)
    trainer.train()
    model = tiny(sleep_passes=2).train()
    loss = loss_in_pieces(model, rows)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert logged(trainer)[0] == pytest.approx(loss.item(), rel=1e-5)
    assert logged(trainer, "grad_norm")[0] == pytest.approx(norm.item(), rel=1e-4)
    without = [{name: column for name, column in row.items() if name != "sleep_after"} for row in rows]
    other = trainer_of(tmp_path, (), without, tiny(sleep_passes=2), SleepCollator(side), **fields)
    other.train()
    assert logged(other)[0] != pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("keep", ["first", "last"])
def test_marked_rows_are_cut_to_their_windows(keep, tmp_path):
    rows, short = marked(), []
    for row in rows:
        windows = naive_windows(len(row["labels"]), row["sleep_after"], L)
        kept = list(chain(*(windows[:3] if keep == "first" else windows[-3:])))
        short.append({name: [column[i] for i in kept] for name, column in row.items()})
    fields = {"train_sampling_strategy": "sequential", "max_steps": 2}
    cut = trainer_of(tmp_path, [WindowsCurriculum({0: 3}, keep)], rows, **fields)
    twin = trainer_of(tmp_path, (), short, **fields)
    for trainer in (cut, twin):
        trainer.train()
    assert logged(cut) == pytest.approx(logged(twin), rel=1e-5)


def test_a_column_of_another_length_is_refused(tmp_path):
    rows = marked(4)
    rows[1]["sleep_after"] = rows[1]["sleep_after"][:-1]
    with pytest.raises(ValueError, match=r"a row has \d+ input_ids and \d+ sleep_after: they must be as many"):
        trainer_of(tmp_path, (), rows).train()
