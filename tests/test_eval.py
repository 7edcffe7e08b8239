"""Loss by position, and answers with their controls: against the plain base and the model's own forward."""

import json
import math
import random
import re
from dataclasses import dataclass

import pytest
import torch
from accelerate import cpu_offload
from families import FAMILIES, exact, make_base, make_config, make_model, sleep_config, tokens
from helpers import EVICTIONS, word_tokenizer, words
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_sleep import SleepForCausalLM
from hf_sleep.data import MQAR, KHop, LongText
from hf_sleep.data.long_text import Told
from hf_sleep.eval import Forgetting, PositionLosses, answers, forgetting, judge, loss_by_position, measure
from hf_sleep.eval.position import FULL, WINDOW, ZEROED, asleep
from hf_sleep.eval.report import forgetting_table, position_table
from hf_sleep.eval.suite import other_windows, run_test
from hf_sleep.training import GenerationEvaluation

L, T = 6, 21
every_family = pytest.mark.parametrize("family", sorted(FAMILIES))
every_eviction = pytest.mark.parametrize("eviction", EVICTIONS)


def settings(family, eviction="hard", **fields):
    style, sinks = EVICTIONS[eviction]
    own = {"window_size": L, "eviction": style, "num_sink_tokens": sinks, "sleep_passes": 2}
    return sleep_config(family, **(own | fields))


def losses(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")


def texts(rows=3):
    return torch.stack([tokens(T, seed) for seed in range(rows)])


@every_family
def test_what_was_not_trained_reads_as_the_base_does(family):
    base = make_base(family, torch.double).eval()
    model, ids = SleepForCausalLM.from_base(base, settings(family)).eval(), texts()
    found = loss_by_position(model, ids, (1,)).losses
    with torch.no_grad():
        torch.testing.assert_close(found[FULL], losses(base(ids, use_cache=False).logits, ids))
        alone = [base(part, use_cache=False).logits for part in ids.split(L, dim=1)]
    torch.testing.assert_close(found[WINDOW], losses(torch.cat(alone, 1), ids))
    assert torch.equal(found[WINDOW], found[ZEROED])
    assert not torch.allclose(found[FULL], found[WINDOW])
    if not model.lm.config.to_dict().get("layer_types") or "linear_attention" not in model.lm.config.layer_types:
        torch.testing.assert_close(found[asleep(1)], found[WINDOW])


@every_family
@every_eviction
def test_the_sleeping_model_reads_as_in_one_call(family, eviction):
    model, ids = make_model(family, settings(family, eviction), torch.double), texts()
    found = loss_by_position(model, ids, (1, 3), batch_size=2).losses
    with torch.no_grad():
        for passes in (1, 3):
            torch.testing.assert_close(found[asleep(passes)], losses(model(ids, sleep_passes=passes).logits, ids))
    different = [found[name][:, L:] for name in (asleep(1), asleep(3), ZEROED, WINDOW)]
    assert not any(torch.allclose(a, b) for i, a in enumerate(different) for b in different[:i])
    if eviction == "hard":
        with torch.no_grad():
            alone = torch.cat([model(part).logits for part in ids.split(L, dim=1)], 1)
        torch.testing.assert_close(found[ZEROED], losses(alone, ids))


def test_the_share_recovered_is_that_of_the_gain():
    window, full = torch.full((6, 11), 3.0), torch.full((6, 11), 1.0)
    mine = torch.tensor([[9.0] * L + [2.0] * 5, [9.0] * L + [2.5] * 5] * 3)
    found = PositionLosses(L, {"sleep": mine, WINDOW: window, FULL: full})
    share, low, high = found.recovered("sleep")
    assert share == 0.375
    assert 0.25 <= low < 0.375 < high <= 0.5
    few = PositionLosses(L, {name: losses[:4] for name, losses in found.losses.items()})
    assert few.recovered("sleep")[0] == 0.375
    assert all(map(math.isnan, few.recovered("sleep")[1:]))
    better = PositionLosses(L, found.losses | {ZEROED: torch.full((6, 11), 2.75)})
    assert better.recovered("sleep", ZEROED)[0] == 0.25
    assert better.recovered("sleep") == found.recovered("sleep")
    assert found.by_window("sleep") == [9.0, 2.25]
    plain = better.to_dict()["reads"]["sleep"]
    assert (plain["recovered"], plain["recovered_95"], plain["by_memory"]) == (0.375, [low, high], 0.25)
    broken = PositionLosses(L, better.losses | {"sleep": torch.full((6, 11), math.nan)}).to_dict()
    assert broken["reads"]["sleep"]["loss_by_window"] == [None, None]
    assert json.loads(json.dumps(broken, allow_nan=False)) == broken
    useless = PositionLosses(L, {"sleep": mine, WINDOW: full, FULL: full, ZEROED: full})
    assert math.isnan(useless.recovered("sleep")[0])
    assert useless.to_dict()["reads"]["sleep"]["recovered"] is None
    assert "nothing to recover" in position_table(useless)


@every_family
@every_eviction
def test_forgetting_is_the_loss_of_one_call_over_both_texts(family, eviction):
    model, text = make_model(family, settings(family, eviction), torch.double), tokens(30 * L)
    circle, expected, alone, of_others = torch.cat((text, text)), [], [], []
    with torch.no_grad(), exact():
        found = forgetting(model, text, (1, 3), texts=3, sleep_passes=2, batch_size=2)
        for start in (0, 10 * L, 20 * L):
            told, asked, others = (circle[start + a * L :][: n * L] for a, n in ((0, 4), (4, 1), (15, 3)))
            for windows in found.between:
                ids = torch.cat((told, others[: windows * L], asked))[None]
                expected.append(losses(model(ids, sleep_passes=2).logits, ids)[0, -L + 1 :])
                ids = torch.cat((others[: windows * L], asked))[None]
                of_others.append(losses(model(ids, sleep_passes=2).logits, ids)[0, -L + 1 :])
            alone.append(losses(model(asked[None]).logits, asked[None]))
    assert found.between == (0, 1, 3)
    torch.testing.assert_close(found.losses.flatten(0, 1), torch.stack(expected))
    torch.testing.assert_close(found.others.flatten(0, 1), torch.stack(of_others))
    if eviction == "hard":
        torch.testing.assert_close(found.zeroed, torch.cat(alone)[:, None].expand_as(found.zeroed))
    means = (found.zeroed - found.losses).mean((0, 2))
    assert [gained for gained, _, _ in found.gained()] == pytest.approx(means.tolist(), abs=1e-6)
    means = (found.others - found.losses).mean((0, 2))
    assert [left for left, _, _ in found.left()] == pytest.approx(means.tolist(), abs=1e-6)


def test_what_is_gained_has_an_interval_of_five_texts_or_more():
    losses = torch.arange(6.0)[:, None, None].expand(6, 2, 3)
    zeroed = losses + torch.tensor([[1.0], [2.0]]) + losses / 10
    found = Forgetting((0, 1), losses, zeroed, zeroed + 1)
    for (gained, low, high), expected in zip(found.gained(), (1.25, 2.25), strict=True):
        assert gained == pytest.approx(expected)
        assert expected - 0.25 < low < expected < high < expected + 0.25
    few = Forgetting((0, 1), found.losses[:4], found.zeroed[:4], found.others[:4])
    assert few.to_dict()["gained_95"] == [[pytest.approx(1.15), None, None], [pytest.approx(2.15), None, None]]
    assert "| gained by all memory (95 %) | 1.150 | 2.150 |" in forgetting_table(few)
    assert "| left of the text (95 %) | 2.150 | 3.150 |" in forgetting_table(few)
    assert re.search(r"\| 1\.250 \(1\.\d+ to 1\.\d+\) \|", forgetting_table(found))


def test_nothing_is_left_of_a_text_where_only_its_first_token_stays():
    """As a sink, which is the same for every text, of an untrained retrofit."""
    own = settings("llama", "hard+sink", num_sink_tokens=1)
    model = make_model("llama", own, torch.double, trained=False).eval()
    found = forgetting(model, tokens(96), (1, 3), texts=2, sleep_passes=2, start=[60])
    torch.testing.assert_close(found.others, found.losses)


def test_texts_that_would_overlap_are_not_read():
    model = make_model("llama", settings("llama"))
    assert len(forgetting(model, tokens(96), (3,), texts=20, sleep_passes=1).losses) == 96 // (5 * L)


@pytest.mark.parametrize(("field", "value"), [("between", (-1,)), ("texts", 0), ("batch_size", 0)])
def test_numbers_that_forgetting_cannot_take(field, value):
    given = {"between": (1,), "texts": 1, "batch_size": 1} | {field: value}
    with pytest.raises(ValueError, match=field):
        forgetting(make_model("llama", settings("llama")), tokens(96), sleep_passes=1, **given)


def test_forgetting_takes_text_enough_for_texts_and_what_is_between():
    model = make_model("llama", settings("llama"))
    with pytest.raises(ValueError, match=r"the text has 95 tokens, and forgetting over 3 windows of 6 takes 96"):
        forgetting(model, tokens(95), (3,), texts=2, sleep_passes=1)
    with pytest.raises(ValueError, match=r"training mode"):
        forgetting(model.train(), tokens(96), (3,), texts=2, sleep_passes=1)


def test_a_base_that_was_made_with_loops_reads_with_all_of_them():
    config = make_config("ouro")
    config.total_ut_steps = 3
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).double().eval()
    model, ids = SleepForCausalLM.from_base(base, settings("ouro", loop_layers=None)).eval(), texts()
    found = loss_by_position(model, ids, (1,)).losses
    with torch.no_grad():
        torch.testing.assert_close(found[FULL], losses(base(ids, use_cache=False).logits, ids))
        alone = [base(part, use_cache=False).logits for part in ids.split(L, dim=1)]
    torch.testing.assert_close(found[WINDOW], losses(torch.cat(alone, 1), ids))
    assert not torch.allclose(found[WINDOW], found[asleep(1)])


def test_rows_that_cannot_be_read_are_refused():
    model = make_model("llama", settings("llama"))
    with pytest.raises(ValueError, match=r"training mode, .* call model\.eval\(\) first"):
        loss_by_position(model.train(), texts())
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        measure(model, None, [], (1,))
    model.eval()
    with pytest.raises(ValueError, match=r"ids has shape \[1, 6\]: it must be \[R, T\] with T above window_size=6"):
        loss_by_position(model, tokens(L)[None])
    most = model.config.text_config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"rows of {most + 1} tokens, and the base reads {most}"):
        loss_by_position(model, torch.zeros(1, most + 1, dtype=torch.long))


@dataclass(frozen=True)
class LastWord(LongText):
    """Asks for the first word of the text."""

    new_tokens = 5

    @property
    def difficulties(self):
        return (1,)

    def chance(self, difficulty):
        return 0.0

    def _tell(self, rng: random.Random) -> Told:
        said = [words(1, rng.randrange(10**6)) for _ in range(3)]
        told = [[f" {said[0]}"], *([] for _ in range(self.windows - 1))]
        return Told("", told, lambda: " " + words(1, rng.randrange(10**6)), f" {said[1]} w1", said[:1] + said[2:], 1)


@pytest.fixture(scope="module")
def asked():
    model = make_model("llama", settings("llama"), torch.double)
    model.generation_config.eos_token_id = 9
    task = LastWord(word_tokenizer(), windows=2, window_size=L)
    return model, task, task.rows(0, "test", range(12))


def test_a_long_text_fills_its_windows_and_sleeps_at_their_ends(asked):
    _, task, rows = asked
    for row in rows:
        assert [i for i, sleeps in enumerate(row["sleep_after"]) if sleeps] == [L - 1, 2 * L - 1]
        assert task.tokenizer.decode(row["input_ids"]).split()[: 2 * L].count(row["references"][0])
        said = task.tokenizer(" " + ", ".join(row["references"])).input_ids
        assert row["labels"] == [-100] * (len(row["labels"]) - len(said) - 1) + [*said, task.tokenizer.eos_token_id]
        assert row["input_ids"][-len(said) - 1 :] == row["labels"][-len(said) - 1 :]
    row = {"references": ["w7", "w8"]}
    assert task.judge("w1 W8.", row) == [False, True]


def test_what_is_said_counts_up_to_the_end_of_the_text_and_alone(asked):
    model, task, rows = asked
    found = judge(model, task, rows, 5)
    assert found == [answer for row in rows for answer in judge(model, task, [row], 1)]
    for row, answers_of_row in zip(rows, found, strict=True):
        prompt = answers.first_answer(row)
        ids = {name: torch.tensor([row[name][:prompt]]) for name in ("input_ids", "sleep_after")}
        said = model.generate(**ids, max_new_tokens=5, do_sample=False)[0, prompt:].tolist()
        said = said[: said.index(9)] if 9 in said else said
        text = task.tokenizer.decode(said)
        assert answers_of_row == [(1, reference in text) for reference in row["references"]]


def test_where_there_are_choices_the_likeliest_of_them_counts():
    task = MQAR(pairs=4, vocab_size=60, first_id=10, window_size=L)
    model, rows = make_model("llama", settings("llama"), torch.double), task.rows(0, "test", range(20))
    found = judge(model, task, rows, 7)
    for row, right in zip(rows, found, strict=True):
        batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "sleep_after")}
        with torch.no_grad():
            logits = model(**batch).logits[0]
        asked = [i for i, label in enumerate(row["labels"]) if label != -100]
        said = [max(row["choices"], key=lambda token: logits[i - 1, token].item()) for i in asked]
        assert right == [(4, token == row["labels"][i]) for i, token in zip(asked, said, strict=True)]
    exact = judge(model, task, [{k: v for k, v in row.items() if k != "choices"} for row in rows], 7)
    assert sum(r for row in found for _, r in row) > sum(r for row in exact for _, r in row)


def test_every_control_is_measured(asked):
    model, task, rows = asked
    scores = measure(model, task, rows, (1, 2), 4)
    assert [(score["reads"], score["N"]) for score in scores] == [
        ("all", 1),
        ("all", 2),
        ("last_window", 2),
        ("full", 2),
        ("same_bytes", 2),
    ]
    assert {score["n"] for score in scores} == {24}
    assert measure(model, task, rows, (2,), 12, ()) == scores[1:2]
    assert model.config.sleep.window_size == L


@pytest.mark.parametrize(
    "as_users_hold_it",
    [
        lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)),
        lambda model: cpu_offload(model, torch.device("cpu")),
    ],
    ids=["a PeftModel", "weights kept elsewhere"],
)
def test_answers_are_the_same_however_the_model_is_held(asked, as_users_hold_it):
    _, task, rows = asked
    plain, model = (make_model("llama", settings("llama"), torch.double).eval() for _ in range(2))
    for each in (plain, model):
        each.generation_config.eos_token_id = 9
    model.generation_config.repetition_penalty = 9.0  # a greedy answer has none
    held = as_users_hold_it(model).eval()
    assert measure(held, task, rows, (1, 2), 4) == measure(plain, task, rows, (1, 2), 4)
    prompt = [(1, {"input_ids": rows[0]["input_ids"][:T]}, [0] * 5)]
    assert GenerationEvaluation._generate(held, prompt, 2) == GenerationEvaluation._generate(plain, prompt, 2)
    assert model.generation_config.repetition_penalty == 9.0


def test_the_same_bytes_are_spent_on_the_latest_tokens(asked, monkeypatch):
    model, task, rows = asked
    seen = []
    monkeypatch.setattr(answers, "judge", lambda reader, task, rows, size: seen.append((reader, rows)) or [])
    answers._control("same_bytes", model, task, rows, 4)
    ((reader, read),) = seen
    assert reader is not model
    assert reader.lm is model.lm
    assert reader.generation_config is model.generation_config
    info = answers.describe(model.config, dtype=model.dtype)
    before = info.fast_weight_bytes // info.kv_bytes_per_token
    assert answers.same_bytes(model) == before
    hybrid = make_model("qwen3_next", settings("qwen3_next"), torch.double)
    own = answers.describe(hybrid.config, dtype=torch.double)
    assert 0 < answers.same_bytes(hybrid) < own.fast_weight_bytes // own.kv_bytes_per_token
    for row, recent in zip(rows, read, strict=True):
        start = max(0, 2 * L - before)
        assert recent["input_ids"] == row["input_ids"][start:]
        assert "sleep_after" not in recent


@pytest.mark.parametrize(("eviction", "kept"), [("sliding", L - 1), ("sliding+sink", L - 1), ("hard+sink", 0)])
def test_the_same_bytes_count_what_the_eviction_keeps(eviction, kept, asked):
    _, _, rows = asked
    model = make_model("llama", settings("llama", eviction), torch.double)
    sinks = model.config.sleep.num_sink_tokens
    start = max(0, 2 * L - kept - answers.same_bytes(model))
    for row, read in zip(rows, answers.read_by("same_bytes", model, rows), strict=True):
        expected = row["input_ids"] if start <= sinks else row["input_ids"][:sinks] + row["input_ids"][start:]
        assert read["input_ids"] == expected


def test_where_eviction_keeps_tokens_the_last_window_has_them(asked, monkeypatch):
    _, task, rows = asked
    for eviction, sinks, before in (
        ("sliding", 0, L - 1),
        ("hard+sink", 2, 0),
        ("hard", 0, 0),
        ("sliding+sink", 2, L - 1),
    ):
        model = make_model("llama", settings("llama", eviction), torch.double)
        read = answers.read_by("last_window", model, rows)
        for row, mine in zip(rows, read, strict=True):
            assert mine["input_ids"] == row["input_ids"][:sinks] + row["input_ids"][2 * L - before :]
            assert len(mine["labels"]) == len(mine["input_ids"])
            assert answers.first_answer(mine) == answers.first_answer(row) - 2 * L + before + sinks
    slept = []
    model = make_model("llama", settings("llama", "sliding"), torch.double)
    with model.on_sleep(slept.append):
        answers._control("last_window", model, task, rows, 4)
    assert not slept


def test_a_task_with_windows_of_another_length_says_so(asked):
    model, task, _ = asked
    assert other_windows(model, task) is None
    said = (
        "its text comes in windows of 7 tokens, and the model, which sleeps after 6, reads less than one of them before"
    )
    assert other_windows(model, KHop(num_nodes=5)) == f"{said} a sleep"


def test_a_text_begins_as_the_tokenizer_lets_it_begin():
    ids, model = tokens(40 * L), make_model("llama", settings("llama"), torch.double)
    told = []
    handle = model.lm.get_input_embeddings().register_forward_hook(lambda m, args, out: told.append(args[0]))
    forgetting(model, ids, (1,), texts=2, sleep_passes=1, batch_size=2, start=[7, 8])
    handle.remove()
    for row, at in zip(told[0], (0, 20 * L), strict=True):
        assert row.tolist() == [7, 8, *ids[at:][: row.shape[0] - 2].tolist()]


def test_what_has_no_positions_is_left_out_and_said(asked):
    model, task, _ = asked
    most = model.config.text_config.max_position_embeddings
    long = LastWord(word_tokenizer(), windows=most // L + 1, window_size=L)
    found = run_test(model, "last", [long], (1,), rows=1)
    assert found.left_out.keys() == {"full"}
    assert f"and the base has {most} positions" in found.left_out["full"]
    assert {score["reads"] for score in found.scores} == {"all", "last_window", "same_bytes"}
    assert not run_test(model, "last", [task], (1,), rows=1).left_out
