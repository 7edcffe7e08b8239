"""A loss of one's own in `forward`: naive formulas on logits, wherever pads, sleeps and checkpoints are."""

import pytest
import torch
import torch.nn.functional as F
from families import VOCAB, make_model, sleep_config, tokens
from helpers import assert_close, loss_and_gradients, pad

LENGTHS = (17, 4, 9)
L = 5
CASES = {
    "hard": {},
    "N2": {"sleep_passes": 2, "between": "gate"},
    "sliding": {"eviction": "sliding", "num_sink_tokens": 1, "sleep_passes": 2},
}


def tiny(family="llama", **fields):
    return make_model(family, sleep_config(family, **{"window_size": L} | fields), torch.float64)


def batch_of(side):
    """Rows of different lengths, with a label here and there, and numbers for each of their tokens, in columns."""
    rows = [tokens(n, seed=n) for n in LENGTHS]
    generator = torch.Generator().manual_seed(5)
    labels = [torch.where(torch.rand(len(row), generator=generator) < 0.7, row, -100) for row in rows]
    soft = [torch.randn(len(row), VOCAB, generator=generator, dtype=torch.float64).softmax(-1) for row in rows]
    weight = [torch.rand(len(row), generator=generator, dtype=torch.float64) for row in rows]
    ids, mask = pad(rows, side)
    labels = torch.where(mask.bool(), pad(labels, side)[0], -100)
    width, wide = ids.shape[1], torch.zeros(*ids.shape, VOCAB, dtype=torch.float64)
    weights = torch.zeros(ids.shape, dtype=torch.float64)
    for r, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        wide[r, columns], weights[r, columns] = soft[r], weight[r]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}, wide, weights


def distilling(soft, weights, seen=None):
    """A weighted sum of cross-entropy and of what `soft` `[B, T, vocab]` says at the same columns."""

    def token_loss(logits, targets, rows, columns):
        if seen is not None:
            seen.extend(zip(rows.tolist(), columns.tolist(), targets.tolist(), strict=True))
        log_p = logits.log_softmax(-1)
        each = -log_p.gather(-1, targets[:, None])[:, 0] - (soft[rows, columns] * log_p).sum(-1)
        return (weights[rows, columns] * each).sum()

    return token_loss


def naive(model, batch, soft, weights):
    """The same from all logits, token by token; the mean over the targets, and which these are."""
    logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}, use_cache=False).logits
    log_ps = logits.log_softmax(-1)
    total, places = 0.0, []
    for r, c in (batch["attention_mask"][:, :-1] * batch["attention_mask"][:, 1:]).nonzero().tolist():
        target = batch["labels"][r, c + 1].item()
        if target != -100:
            log_p = log_ps[r, c]
            total = total + weights[r, c] * (-log_p[target] - (soft[r, c] * log_p).sum())
            places.append((r, c, target))
    return total / len(places), places


@pytest.mark.parametrize("mode", ["train", "checkpointing", "eval", "keep"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_a_naive_formula_on_logits(case, side, mode):
    """And is told of every target once, at the column whose logits predict it."""
    model = tiny(**CASES[case])
    batch, soft, weights = batch_of(side)
    loss, places = naive(model, batch, soft, weights)
    expected = loss_and_gradients(model, loss)
    assert any(g.abs().max() > 1e-3 for name, g in expected[1].items() if name.startswith("fast_weights"))
    model.train(mode != "eval").gradient_checkpointing = mode == "checkpointing"
    seen = []
    out = model(
        **batch, token_loss=distilling(soft, weights, seen), logits_to_keep=2 if mode == "keep" else 0, use_cache=False
    )
    assert sorted(seen) == places
    assert (out.logits is None) == (mode in ("train", "checkpointing"))
    found = loss_and_gradients(model, out.loss)
    assert len(seen) == len(places) * (2 if mode == "checkpointing" else 1)
    assert_close(found[0], expected[0], 1e-12, "loss")
    for name, gradient in expected[1].items():
        assert_close(found[1][name], gradient, 1e-9, f"gradient of {name}")


@pytest.mark.parametrize("training", [True, False])
def test_cross_entropy_of_one_s_own_is_the_model_s(training):
    model = tiny(sleep_passes=2).train(training)
    batch, _, _ = batch_of("left")
    items = torch.tensor(50)

    def cross_entropy(logits, targets, rows, columns):
        return F.cross_entropy(logits, targets, reduction="sum")

    own = loss_and_gradients(model, model(**batch, token_loss=cross_entropy, num_items_in_batch=items).loss)
    stock = loss_and_gradients(model, model(**batch, num_items_in_batch=items).loss)
    assert torch.equal(own[0], stock[0])
    assert all(torch.equal(own[1][name], gradient) for name, gradient in stock[1].items())


def test_logits_come_in_float32_and_only_those_of_a_window():
    model = make_model("llama", sleep_config("llama", window_size=L), torch.bfloat16).train()
    batch, _, _ = batch_of("right")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    calls = []

    def token_loss(logits, targets, rows, columns):
        calls.append((logits.dtype, len(targets)))
        return logits.sum()

    model(**batch, token_loss=token_loss)
    assert {dtype for dtype, _ in calls} == {torch.float32}
    assert max(n for _, n in calls) <= len(LENGTHS) * L
    assert len(calls) == 4


def test_without_targets_nobody_is_asked_and_the_loss_has_a_graph():
    model = tiny().train()
    batch, _, _ = batch_of("right")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for training in (True, False):
        loss = model.train(training)(**batch, token_loss=lambda *_: pytest.fail("asked")).loss
        loss.backward()
        assert loss.item() == 0


def test_it_is_called_through_sleeps_where_the_data_says():
    model = tiny(sleep_passes=2).train()
    batch, soft, weights = batch_of("left")
    batch["sleep_after"] = torch.zeros_like(batch["input_ids"])
    batch["sleep_after"][0, 6] = batch["sleep_after"][2, 11] = 1
    trained = model(**batch, token_loss=distilling(soft, weights)).loss
    judged = model.eval()(**batch, token_loss=distilling(soft, weights)).loss
    assert_close(trained, judged, 1e-12)
    del batch["sleep_after"]
    assert abs(model(**batch, token_loss=distilling(soft, weights)).loss - judged) > 1e-4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_loss": 3}, "token_loss=3: it must be a function of"),
        ({"token_loss": len, "labels": None}, "token_loss without labels"),
        ({"token_loss": lambda logits, *_: logits.sum(-1)}, r"token_loss returned shape \(\d+,\): it must be a tensor"),
        ({"token_loss": lambda *_: 0.0}, "token_loss returned float: it must be a tensor"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_what_cannot_be_a_loss_is_refused(training, fields, message):
    batch, _, _ = batch_of("right")
    with pytest.raises(ValueError, match=message):
        tiny().train(training)(**batch | fields)
