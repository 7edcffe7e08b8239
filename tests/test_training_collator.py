"""SleepCollator: rows of different lengths in one batch lose and gain nothing."""

import pytest
import torch
from families import make_model, sleep_config, tokens

from hf_sleep.training import SleepCollator

L = 5
LENGTHS = (3, 17, 10, 11)


def ragged():
    """Rows that end before, at and after the boundary of a window, with labels everywhere but in the middle."""
    rows = []
    for i, length in enumerate(LENGTHS):
        ids = tokens(length, seed=i).tolist()
        labels = list(ids)
        labels[length // 2] = -100
        rows.append({"input_ids": ids, "labels": labels, "difficulty": i, "answer": [1, 2], "text": "dropped"})
    return rows


def summed_loss(model, batch):
    """Compute the loss as Trainer does: the mean over its own count of labels, times that count."""
    count = (batch["labels"] != -100).sum()
    return model(**batch, num_items_in_batch=count).loss * count, count


def test_what_a_batch_looks_like():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = SleepCollator(pad_token_id=9)(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [-100, -100, -100]],
    }
    left = SleepCollator(padding_side="left", pad_to_multiple_of=4)(rows)
    assert left["input_ids"].tolist() == [[0, 5, 6, 7], [0, 0, 0, 8]]
    assert left["labels"].tolist() == [[-100, -100, 6, 7], [-100, -100, -100, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in left.values())


def test_metadata_is_dropped_and_a_row_s_own_pads_stay_pads():
    row = {"input_ids": [4, 5, 6, 0], "attention_mask": [1, 1, 1, 0], "labels": [4, 5, 6, 0], "difficulty": 3}
    batch = SleepCollator(padding_side="left")([row, {**row, "answer": [1]}])
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0]] * 2
    assert batch["labels"].tolist() == [[-100, 5, 6, -100]] * 2
    assert SleepCollator()([{"input_ids": [1, 2]}]).keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_where_rows_sleep_is_padded_with_no_sleep(side):
    rows = [{"input_ids": [4, 5, 6], "sleep_after": [0, 1, 1]}, {"input_ids": [7], "sleep_after": [True]}]
    batch = SleepCollator(side, pad_token_id=1)(rows)
    assert batch["sleep_after"].dtype == torch.int64
    assert batch["sleep_after"].tolist() == [[0, 1, 1], [0, 0, 1] if side == "left" else [1, 0, 0]]
    assert "labels" not in batch
    labelled = SleepCollator(side)([{**row, "labels": row["input_ids"]} for row in rows])
    assert labelled.keys() == {"input_ids", "attention_mask", "labels", "sleep_after"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("collator", [SleepCollator("right"), SleepCollator("left", 8), SleepCollator("right", 16)])
def test_padding_changes_nothing(collator, eviction, training):
    """Each row has the windows, and the loss, that it has alone."""
    sleep = sleep_config("llama", window_size=L, sleep_passes=2, eviction=eviction)
    model = make_model("llama", sleep, torch.float64).train(training)
    alone = [summed_loss(model, SleepCollator()([row])) for row in ragged()]
    loss, count = summed_loss(model, collator(ragged()))
    # One label in the middle and the first one of each row are not trained.
    assert count == sum(count for _, count in alone) == sum(LENGTHS) - 2 * len(LENGTHS)
    torch.testing.assert_close(loss, sum(loss for loss, _ in alone), rtol=1e-12, atol=0)


def test_both_sides_have_the_same_gradients():
    gradients = {}
    for side in ("left", "right"):
        model = make_model("llama", sleep_config("llama", window_size=L, sleep_passes=3)).train()
        model(**SleepCollator(side)(ragged())).loss.backward()
        gradients[side] = [p.grad for p in model.parameters()]
    for left, right in zip(gradients["left"], gradients["right"], strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("fields", "marks"),
    [
        ({"seq_idx": [0, 0, 1, 1]}, "seq_idx"),
        ({"cu_seq_lens_q": [0, 2, 4], "cu_seq_lens_k": [0, 2, 4]}, "cu_seq_lens_q, cu_seq_lens_k"),
        ({"position_ids": [0, 1, 0, 1]}, "position_ids that restart"),
        ({"seq_lengths": [2, 2]}, "seq_lengths"),
    ],
)
def test_packed_samples_are_refused(fields, marks):
    row = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}
    with pytest.raises(ValueError, match=rf"packed samples \(it has {marks}\).*Turn packing off"):
        SleepCollator()([row, {**row, **fields}])


def test_positions_that_only_count_up_are_no_sign_of_packing():
    row = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    batch = SleepCollator()([{**row, "position_ids": [0, 1, 2], "seq_lengths": [3]}])
    assert torch.equal(batch["input_ids"], SleepCollator()([row])["input_ids"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input_ids": [1, 2], "labels": [1]}], "2 input_ids and 1 labels"),
        ([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1]}], "some rows of the batch have labels"),
        ([{"input_ids": [1, 2], "sleep_after": [1]}], "2 input_ids and 1 sleep_after"),
        ([{"input_ids": [1], "sleep_after": [1]}, {"input_ids": [1]}], "some rows of the batch have sleep_after"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        SleepCollator()(rows)


@pytest.mark.parametrize("fields", [{"padding_side": "middle"}, {"pad_to_multiple_of": 0}])
def test_settings_that_cannot_work_are_refused(fields):
    with pytest.raises(ValueError, match=f"SleepCollator.{next(iter(fields))}="):
        SleepCollator(**fields)
