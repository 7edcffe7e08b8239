"""The laws of a sleeping model, for every base family, eviction style, number of passes and looped range.

Everything runs in float64 with the stock modules' float32 casts lifted (`families.exact`), so that two orders of
summation agree to 1e-9 and any real difference shows; law 3 is also held in plain float32, and law 1 bit for bit.
"""

import itertools
import warnings

import pytest
import torch
from families import BITWISE, FAMILIES, HYBRIDS, exact, make_base, make_model, sleep_config, tokens
from helpers import (
    EVICTIONS,
    L,
    T,
    assert_close,
    assert_loss_and_gradients,
    assert_same_states,
    flat_logits,
    labelled_batch,
    loss_and_gradients,
    pad,
    sleeper,
    states,
    stream,
    with_memory_of,
)
from reference import reference_run
from transformers import AutoModelForCausalLM

from hf_sleep import SleepCache, SleepForCausalLM
from hf_sleep.compat import CHECKPOINTING

FULL = [f"{f}/{e}/N{n}/all" for f, e, n in itertools.product(FAMILIES, EVICTIONS, (1, 2, 3, 4))]
LOOPED = [
    f"{f}/{e}/N{n}/{loop}"
    for f, e, n, loop in itertools.product(
        ("llama", "gemma3", "qwen3_next", "jet_nemotron", "ouro"), ("hard", "sliding+sink"), (1, 2, 3), ("1-3", "0-2")
    )
]
# Every family with every eviction, every N, every loop range and every option at least once, for laws in which they do
# not interact.
OPTIONS = ("", "/gate", "/once", "/gate+once")
SPREAD = [
    f"{f}/{e}/N{1 + (i + j + 1) % 4}/{('all', '1-3', '0-2')[(i + j) % 3]}{OPTIONS[(i // 4 + j) % 4]}"
    for (i, f), (j, e) in itertools.product(enumerate(FAMILIES), enumerate(EVICTIONS))
]


# 1. Identity.


@pytest.mark.parametrize("passes", [1, 2, 4])
@pytest.mark.parametrize("eviction", ["hard", "sliding+sink"])
@pytest.mark.parametrize("family", BITWISE)
def test_1_an_untrained_retrofit_is_the_base_bit_for_bit(family, eviction, passes):
    style, sinks = EVICTIONS[eviction]
    sleep = sleep_config(family, window_size=16, sleep_passes=passes, eviction=style, num_sink_tokens=sinks)
    model, ids = make_model(family, sleep, trained=False), torch.stack((tokens(16, 1), tokens(16, 2)))
    with torch.no_grad():
        expected = make_base(family)(ids).logits
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids[:, :1]).logits, make_base(family)(ids[:, :1]).logits)
        base = make_base(family)
        for size in (1, 3, 4, 16):
            part, past = model(ids[:, :size], use_cache=True), base(ids[:, :size], use_cache=True)
            assert torch.equal(part.logits, past.logits)


@pytest.mark.parametrize("family", BITWISE)
def test_1_an_untrained_retrofit_generates_what_the_base_generates(family):
    model, base = make_model(family, sleep_config(family, window_size=24), trained=False), make_base(family)
    for rows in ([tokens(9)], [tokens(9), tokens(5, 2), tokens(1, 3)]):
        ids, mask = pad(rows, "left")
        settings = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False}
        expected = base.generate(ids, **settings)
        assert torch.equal(model.generate(ids, **settings), expected)


@pytest.mark.parametrize("family", BITWISE)
def test_1_one_pass_and_a_window_that_never_fills_is_always_the_base(family):
    model, ids = (
        make_model(family, sleep_config(family, window_size=512, sleep_passes=1), trained=False),
        tokens(90)[None],
    )
    with torch.no_grad():
        assert torch.equal(model(ids).logits, make_base(family)(ids).logits)


@pytest.mark.parametrize("eviction", EVICTIONS)
@pytest.mark.parametrize("family", [name for name in BITWISE if name != "jet_nemotron"])
def test_1_with_a_gate_every_number_of_passes_is_one_pass_bit_for_bit(family, eviction):
    """A closed gate repeats pass 1, which bases with fast weights of their own would write twice."""
    style, sinks = EVICTIONS[eviction]
    fields = {"window_size": L, "between": "gate", "eviction": style, "num_sink_tokens": sinks}
    ids = torch.stack((tokens(4 * L + 3, 1), tokens(4 * L + 3, 2)))
    for loop in (None, (0, 4)):
        model = make_model(family, sleep_config(family, loop_layers=loop, **fields), trained=False)
        with torch.no_grad():
            expected = model(ids, sleep_passes=1).logits
            for passes in (2, 4):
                assert torch.equal(model(ids, sleep_passes=passes).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_1_wrapping_leaves_the_base_untouched(family):
    def look(config):
        return {**config.to_dict(), "attn": config._attn_implementation, "experts": config._experts_implementation}

    base, untouched = make_base(family), make_base(family)
    model = SleepForCausalLM.from_base(base, sleep_config(family))
    assert model.lm is base
    assert look(base.config) == look(untouched.config)
    assert base.state_dict().keys() == untouched.state_dict().keys()
    assert all(torch.equal(tensor, untouched.state_dict()[name]) for name, tensor in base.state_dict().items())
    assert torch.equal(base(tokens(9)[None]).logits, untouched(tokens(9)[None]).logits)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("family", [name for name in HYBRIDS if name not in BITWISE])
def test_1_an_untrained_hybrid_is_the_base_to_rounding(family, passes):
    """Stock linear layers' recurrence runs on hf_sleep.ops, not transformers' fallback: nothing is bit for bit."""
    sleep = sleep_config(family, window_size=80, sleep_passes=passes)
    ids = tokens(70)[None]
    with torch.no_grad():
        assert_close(make_model(family, sleep, trained=False)(ids).logits, make_base(family)(ids).logits, 1e-4)
    with torch.no_grad(), exact():
        model, base = make_model(family, sleep, torch.double, trained=False), make_base(family, torch.double)
        assert_close(model(ids).logits, base(ids).logits, 1e-11)


# 2. N = 1 is the hybrid.


@pytest.mark.parametrize("eviction", ["hard", "hard+sink", "sliding"])
@pytest.mark.parametrize("family", FAMILIES)
def test_2_one_pass_is_the_plain_hybrid(family, eviction):
    """The base over the whole sequence at once: block-diagonal, or a sliding window at absolute positions."""
    model, ids = sleeper(f"{family}/{eviction}/N1/all"), tokens(T)
    sinks = EVICTIONS[eviction][1]
    positions = list(range(T)) if eviction == "sliding" else [t if t < L else sinks + t % L for t in range(T)]

    def may_see(i, j):
        return i - j < L if eviction == "sliding" else i // L == j // L or j < sinks

    with exact(), torch.no_grad():
        assert_close(model(ids[None]).logits[0], flat_logits(model, ids, positions, may_see))


# 3. Algorithm 1.


@pytest.mark.parametrize("case", FULL + LOOPED)
def test_3_logits_and_states_are_those_of_algorithm_1(case):
    model, ids = sleeper(case), tokens(T)
    with exact(), torch.no_grad():
        out = model(ids[None], use_cache=True)
        run = reference_run(model, ids)
        assert_close(out.logits[0], run.logits, what="logits")
        assert_same_states(states(model, out.cache), run.memory)


@pytest.mark.parametrize("case", SPREAD)
def test_3_loss_and_gradients_are_those_of_algorithm_1(case):
    with exact():
        assert_loss_and_gradients(case, sleeper(case), 1e-9)


# Some of these weights amplify rounding with an option: then the reference's own float32 gradients are off by more.
PLAIN = ["/".join(case.split("/")[:4]) for case in SPREAD[::3]]
WITH_OPTIONS = [
    f"{f}/{e}/N3/1-3{o}"
    for f, e, o in itertools.product(("llama", "gemma3", "jet_nemotron"), ("hard", "sliding+sink"), OPTIONS[1:])
]


@pytest.mark.parametrize("case", PLAIN + WITH_OPTIONS)
def test_3_also_in_float32(case):
    assert_loss_and_gradients(case, sleeper(case, torch.float32), 1e-4)


@pytest.mark.parametrize("case", [case for case in SPREAD if case.split("/")[2] in ("N1", "N4")])
@pytest.mark.parametrize("backprop_windows", [1, 2])
def test_3_truncated_gradients_are_cut_after_every_so_many_windows(case, backprop_windows):
    with exact():
        assert_loss_and_gradients(case, sleeper(case), 1e-9, backprop_windows)


@pytest.mark.parametrize("backprop_windows", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "jet_nemotron", "ouro"])
def test_3_each_row_counts_its_own_sleeps_where_gradients_are_cut(family, backprop_windows):
    """Rows that enter the call with windows of different fill sleep at different tokens of it."""
    model = sleeper(f"{family}/sliding+sink/N2/all").train()
    past, turn = [tokens(n, n) for n in (2, L - 1, L + 3)], torch.stack([tokens(3 * L + 4, n) for n in (1, 2, 3)])

    def gradients(rows):
        ids, mask = pad([past[r] for r in rows], "left")
        cache = SleepCache()
        with torch.no_grad():
            model(ids, attention_mask=mask, cache=cache)
        settings = {"num_items_in_batch": 1, "backprop_windows": backprop_windows}
        return loss_and_gradients(model, model(turn[rows], labels=turn[rows], cache=cache, **settings).loss)

    with exact():
        together, alone = gradients([0, 1, 2]), [gradients([r]) for r in range(3)]
    assert_close(together[0], sum(loss for loss, _ in alone))
    for name, gradient in together[1].items():
        assert_close(gradient, sum(each[name] for _, each in alone), what=name)


@pytest.mark.parametrize("case", SPREAD)
def test_3_explicit_sleeps_consolidate_partial_windows(case):
    model, ids = sleeper(case), tokens(T)
    explicit, cache, logits = (
        dict.fromkeys((0, 3, L + 3, 2 * L + 3, T - 1), model.config.sleep.sleep_passes),
        SleepCache(),
        [],
    )
    with exact(), torch.no_grad():
        run = reference_run(model, ids, sleep_after=explicit)
        for t in range(T):
            logits.append(model(ids[None, t : t + 1], cache=cache).logits[0])
            if t in explicit:
                model.sleep(cache)
                model.sleep(cache)  # nothing was read in between: nothing happens
        assert_close(torch.cat(logits), run.logits, what="logits")
        assert_same_states(states(model, cache), run.memory)


# 4. Stream = batch.


@pytest.mark.parametrize("case", SPREAD + LOOPED[::3])
def test_4_any_split_into_calls_is_the_same(case):
    model, ids, more = sleeper(case), tokens(T)[None], tokens(L + 2, 9)[None]
    with exact(), torch.no_grad():
        whole, cache = stream(model, ids, [T])
        state = states(model, cache)
        after, _ = stream(model, more, [L + 2], cache)
        for sizes in ([1] * T, [4, 9, 3, 1], [2 * L, L, 2], [T - L] + [1] * L):
            logits, cache = stream(model, ids, sizes)
            assert_close(logits, whole, what=f"logits of {sizes}")
            assert_same_states(states(model, cache), state)
            assert cache.get_seq_length() == T
            assert_close(stream(model, more, [1, L + 1], cache)[0], after, what=f"continuation of {sizes}")


@pytest.mark.parametrize("case", SPREAD[::4])
def test_4_generate_sleeps_as_it_goes(case):
    model, prompts = sleeper(case), [tokens(L + 2), tokens(2 * L, 2), tokens(2, 3)]
    with exact(), torch.no_grad():
        ids, mask = pad(prompts, "left")
        answers = model.generate(ids, attention_mask=mask, max_new_tokens=2 * L, do_sample=False)
        for prompt, answer in zip(prompts, answers[:, ids.shape[1] :], strict=True):
            logits = reference_run(model, torch.cat((prompt, answer))).logits
            assert torch.equal(logits[len(prompt) - 1 : -1].argmax(-1), answer)


# 5. Rows are alone.


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", SPREAD)
def test_5_a_row_is_what_it_is_alone(case, side):
    """Three calls: a ragged prompt, a ragged second turn in which one row says nothing, and decoding."""
    model = sleeper(case)
    lengths = [(T, 3, 4), (L + 1, 0, 4), (2, L + 2, 4), (L, 1, 4)]
    turns = [
        [tokens(n, 10 * r + c) for r, n in enumerate(column)] for c, column in enumerate(zip(*lengths, strict=True))
    ]
    with exact(), torch.no_grad():
        alone, memories = [], []
        for r in range(len(lengths)):
            run = reference_run(model, torch.cat([turn[r] for turn in turns]))
            alone.append(run.logits)
            memories.append(run.memory)
        cache, read = SleepCache(), [0] * len(lengths)
        full_mask = torch.zeros(len(lengths), 0, dtype=torch.long)
        for number, turn in enumerate(turns):
            ids, mask = pad(turn, side)
            full_mask = torch.cat((full_mask, mask), 1)
            steps = [ids.shape[1]] if number < 2 else [1] * ids.shape[1]
            if number == 1:
                logits = model(ids, attention_mask=full_mask, cache=cache).logits
            else:
                logits, _ = stream(model, ids, steps, cache, attention_mask=mask)
            assert not logits[mask == 0].any()
            for r, row in enumerate(turn):
                expected = alone[r][read[r] : read[r] + len(row)]
                assert_close(logits[r][mask[r].bool()], expected, what=f"row {r} in call {number}")
                read[r] += len(row)
        for r, memory in enumerate(memories):
            assert_same_states(states(model, cache, r), memory)


# 6. Only memory crosses.


@pytest.mark.parametrize("case", [case for case in FULL if "/hard/" in case and case.split("/")[2] in ("N1", "N3")])
def test_6_after_a_hard_eviction_the_past_is_in_the_fast_weights_alone(case):
    model = sleeper(case)
    dream, other, question = tokens(2 * L, 1)[None], tokens(2 * L, 2)[None], tokens(L + 2, 3)[None]
    with exact(), torch.no_grad():
        (_, mine), (_, theirs) = stream(model, dream, [2 * L]), stream(model, other, [2 * L])
        model.sleep(mine)
        model.sleep(theirs)
        assert mine.max_kv_length == 0
        assert mine.kv_bytes() == 0
        expected = model(question, cache=theirs.fork()).logits
        assert (model(question, cache=mine.fork()).logits - expected).abs().max() > 1e-2
        assert torch.equal(model(question, cache=with_memory_of(mine, theirs)).logits, expected)
        assert_close(model(question, cache=with_memory_of(mine, None)).logits, model(question).logits)


@pytest.mark.parametrize("case", [case for case in FULL if "/hard/" in case])
def test_6_the_answer_reaches_the_first_window(case):
    """Its first pass, too: pass 1 is the only one that reads the embedding."""
    model = sleeper(case).train()
    ids = torch.cat((torch.arange(1, 1 + L), torch.arange(30, 30 + L), torch.arange(20, 23)))[None]
    labels = ids.clone()
    labels[:, : 2 * L + 1] = -100
    layers = dict(model.lm.model.embed_tokens.named_parameters())
    model.lm.model.embed_tokens.weight.grad = None
    with exact():
        model(ids, labels=labels).loss.backward()
    reached = layers["weight"].grad.abs().amax(1)
    assert (reached[1 : 1 + L] > 1e-9).all()
    assert model.lm.config.tie_word_embeddings or not reached[40:].any()


# 7. Bounded.


@pytest.mark.parametrize("case", [case for case in FULL if case.split("/")[2] == "N2"])
def test_7_memory_is_bounded_whatever_was_read(case):
    model, ids = sleeper(case), tokens(12 * L, 4)[None]
    sleep, config = model.config.sleep, model.lm.config
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    per_token = sum(kind != "linear_attention" for kind in types) * 2 * config.num_key_value_heads * config.head_dim * 8
    bound = sleep.num_sink_tokens + (L if sleep.eviction == "hard" else 2 * L - 1)
    cache, sizes, everything = SleepCache(), [], []
    with torch.no_grad():
        for t in [*range(8 * L), *range(8 * L, 12 * L, 2 * L)]:
            width = 1 if t < 8 * L else 2 * L
            model(ids[:, t : t + width], cache=cache)
            assert cache.max_kv_length <= bound
            assert cache.kv_bytes() <= bound * per_token
            sizes.append(cache.kv_bytes())
            everything.append(cache.num_bytes())
    assert max(sizes) == bound * per_token  # the bound is reached, so the numbers mean what they say
    assert sizes[4 * L : 5 * L] == sizes[7 * L : 8 * L]
    assert max(everything[4 * L :]) <= max(everything[: 4 * L])
    assert cache.fast_weight_bytes() == sum(t.nbytes for pair in states(model, cache).values() for t in pair)


# 8. Checkpointing is invisible.


@pytest.mark.parametrize("case", SPREAD[1::2])
def test_8_checkpointing_changes_nothing(case):
    model, (_, _, batch) = sleeper(case).train(), labelled_batch(case)
    with exact():
        loss, expected = loss_and_gradients(model, model(**batch).loss)
        getattr(model, f"{CHECKPOINTING}_enable")()
        again, gradients = loss_and_gradients(model, model(**batch).loss)
    assert_close(again, loss, 1e-12)
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient, 1e-12, f"gradient of {name}")


# 9. Round trips.


@pytest.mark.parametrize("family", FAMILIES)
def test_9_saving_and_loading_is_bit_equal(family, tmp_path):
    model, ids = sleeper(f"{family}/sliding+sink/N2/1-3", torch.float32), tokens(T)[None]
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(ids).logits
        for loader in (SleepForCausalLM, AutoModelForCausalLM):
            loaded = loader.from_pretrained(tmp_path).eval()
            loaded.set_experts_implementation("eager")
            for parameter in loaded.parameters():
                # Mapped from the file they may lie unaligned, and then a matmul takes another kernel.
                parameter.data = parameter.data.clone()
            assert type(loaded) is SleepForCausalLM
            assert loaded.config.sleep == model.config.sleep
            assert loaded.state_dict().keys() == model.state_dict().keys()
            for name, tensor in model.state_dict().items():
                assert torch.equal(loaded.state_dict()[name], tensor), name
            assert torch.equal(loaded(ids).logits, expected)


def test_9_nothing_is_left_uninitialised_or_unexpected(tmp_path):
    model = sleeper("qwen3_next/hard/N2/all", torch.float32)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report = SleepForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
