"""Law 12: decoding as one compiled graph gives what decoding gives without, over sleeps too."""

import copy
import gc
import itertools
import shutil
from unittest import mock

import pytest
import torch
from accelerate import dispatch_model
from families import FAMILIES, exact, make_model, sleep_config, tokens
from helpers import EVICTIONS, L, T, assert_close, assert_same_states, pad, sleeper, states, stream
from peft import get_peft_model
from transformers import BitsAndBytesConfig, CompileConfig
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer as BnbQuantizer

from hf_sleep import SleepCache, SleepState, StaticSleepCache, sleep_lora_config
from hf_sleep.compat import CACHE
from hf_sleep.engine import Eviction
from hf_sleep.modeling import compiling

EXPERTS = ("qwen3_next", "qwen3_moe", "mixtral", "gpt_oss", "granitemoehybrid", "kimi_linear")
SPREAD = [
    f"{f}/{e}/N{1 + (i + j) % 3}/{('all', '1-3', '0-2')[(i + j) % 3]}{('', '/gate')[(i // 3 + j) % 2]}"
    for (i, f), (j, e) in itertools.product(enumerate(FAMILIES), enumerate(EVICTIONS))
]
# A graph a family, each with another eviction, is enough: what is compiled is what the others run.
COMPILED = [case for i, case in enumerate(SPREAD) if i % 4 == (i // 4) % 4]
GREEDY = {"do_sample": False, "pad_token_id": 0}


class Counting:
    """A backend of torch.compile that runs graphs as they are, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs, **_):
        self.graphs += 1
        return graph.forward

    def __deepcopy__(self, memo):
        return self


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model, backend=None):
    return model.get_compiled_call(CompileConfig(backend=backend or Counting(), fullgraph=True, dynamic=False))


def model_of(case):
    model = sleeper(case).eval()
    if case.split("/")[0] in EXPERTS:
        # A loop over the experts that were hit is no graph; this is what transformers decodes with.
        model.lm.set_experts_implementation("batched_mm")
    return model


def one_by_one(call, ids, cache):
    """Read `[B, T]` token by token: the logits."""
    return torch.cat([call(input_ids=token, **{CACHE: cache}).logits for token in ids.split(1, 1)], 1)


def held(model, cache):
    """All that a cache holds, as a value."""
    state = SleepState.from_cache(model, cache.fork())
    return {name: t.tolist() for name, t in state.tensors.items()}, state.rows, state.columns


def read_in_turn(case, call_of):
    """Logits token by token over three windows, in two rows that sleep at different times, and the memory at the end.

    Returns:
        How many tokens were read in place, and how many were not.
    """
    with exact(), torch.no_grad():
        model = model_of(case)
        call, static, plain = call_of(model), StaticSleepCache(), SleepCache()
        ids, mask = pad([tokens(L - 1, 3), tokens(2, 4)], "left")
        for cache in (static, plain):
            model(ids, attention_mask=mask, cache=cache)
        in_place = 0
        for column in range(T):
            token = torch.stack((tokens(T, 1)[column], tokens(T, 2)[column]))[:, None]
            expected = model(token, cache=plain).logits
            assert_close(call(input_ids=token, **{CACHE: static}).logits, expected, what=f"column {column}")
            in_place += static.is_in_place
        for row in (0, 1):
            assert_same_states(states(model, static, row), states(model, plain, row))
        assert static.memory.counters == plain.memory.counters
        assert static.memory.columns == plain.memory.columns
    return in_place, sum(row.sleeps for row in plain.memory.counters)


@pytest.mark.parametrize("case", SPREAD)
def test_12_in_place_is_by_values(case):
    """What is compiled, as it is."""
    with mock.patch.object(torch, "compile", lambda function, **_: function):
        in_place, sleeps = read_in_turn(case, compiled)
    assert sleeps >= 6
    assert in_place == T - sleeps


@pytest.mark.parametrize("case", COMPILED)
def test_12_compiled_is_eager(case):
    """One graph, whatever sleeps lie between."""
    backend = Counting()
    in_place, sleeps = read_in_turn(case, lambda model: compiled(model, backend))
    assert in_place == T - sleeps > 0
    assert backend.graphs == 1


def test_20_sleeps_and_other_calls_make_no_new_graph():
    model, backend = sleeper("llama/sliding+sink/N2/1-3").eval(), Counting()
    call, cache = compiled(model, backend), StaticSleepCache()
    with torch.no_grad():
        for column, token in enumerate(tokens(25 * L).split(1)):
            call(input_ids=token[None], **{CACHE: cache})
            if column % 17 == 0:
                model(tokens(3, column)[None], cache=cache)
                cache.fork()
    assert cache.memory.counters[0].sleeps > 20
    assert backend.graphs == 1
    with torch.no_grad():  # another conversation finds the graph, and another number of rows has one of its own
        other = StaticSleepCache()
        one_by_one(call, tokens(2 * L, 5)[None], other)
        assert backend.graphs == 1
        for rows in (2, 3, 2):
            one_by_one(call, tokens(L, 5).expand(rows, L), StaticSleepCache())
    assert backend.graphs == 3


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_generate_says_the_same(eviction):
    """Rows of different lengths, of which one ends early and is fed pads."""
    model = sleeper(f"llama/{eviction}/N2/1-3").eval()
    ids, mask = pad([tokens(2 * L + 1, 1), tokens(3, 2), tokens(L, 3)], "left")
    free = model.generate(ids, attention_mask=mask, max_new_tokens=2 * L, **GREEDY)
    end = free[1, ids.shape[1] + 2].item()  # the second row ends at its third token at the latest
    options = GREEDY | {"max_new_tokens": 2 * L, "eos_token_id": end, "return_dict_in_generate": True}
    backend = Counting()
    config = CompileConfig(backend=backend, fullgraph=True)
    plain = model.generate(ids, attention_mask=mask, **options)
    static = model.generate(ids, attention_mask=mask, cache_implementation="static", compile_config=config, **options)
    assert (plain.sequences[1] == 0).any()
    assert torch.equal(static.sequences, plain.sequences)
    assert backend.graphs == 1
    assert isinstance(static.cache, StaticSleepCache)
    for row in range(3):
        assert_same_states(states(model, static.cache, row), states(model, plain.cache, row))
    assert static.cache.memory.counters == plain.cache.memory.counters


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_generate_with_several_rows_each(options):
    model = sleeper("llama/hard/N2/all").eval()
    said = []
    for more in ({}, {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager")}):
        torch.manual_seed(0)
        said.append(model.generate(tokens(L + 2)[None], max_new_tokens=2 * L, **(GREEDY | options | more)))
    assert torch.equal(*said)


def test_a_value_that_was_taken_stays():
    """A fork, a state and a part of the rows are of the moment, whatever is decoded after, and continue from it."""
    model = sleeper("qwen3_next/sliding+sink/N2/all")
    model.lm.set_experts_implementation("batched_mm")
    call, cache = compiled(model.eval()), StaticSleepCache()
    ids = torch.stack((tokens(T, 1), tokens(T, 2)))
    with exact(), torch.no_grad():
        one_by_one(call, ids[:, :3], cache)
        assert cache.is_in_place
        fork = cache.fork()
        then = held(model, cache)
        one_by_one(call, ids[:, 3:], cache)
        assert then == held(model, fork) != held(model, cache)
        assert isinstance(fork, StaticSleepCache)
        again = one_by_one(call, ids[:, 3:], fork)
        expected, plain = stream(model, ids, [1] * T)
        assert_close(again, expected[:, 3:])
        cache.batch_select_indices(torch.tensor([1]))
        more = tokens(4, 9)[None]
        plain.batch_select_indices(torch.tensor([1]))
        assert_close(one_by_one(call, more, cache), stream(model, more, [1] * 4, plain)[0])


def test_what_is_held_never_grows():
    model = sleeper("llama/hard+sink/N2/all").eval()
    call, cache = compiled(model), StaticSleepCache()
    sizes = set()
    with torch.no_grad():
        for token in tokens(6 * L).split(1):
            call(input_ids=token[None], **{CACHE: cache})
            if cache.is_in_place:
                sizes.add(cache.num_bytes())
    assert len(sizes) == 1


def test_a_step_that_fails_changes_nothing():
    model = sleeper("llama/hard/N2/all").eval()
    call, cache = compiled(model), StaticSleepCache()
    ids = tokens(L)[None]
    with torch.no_grad():
        one_by_one(call, ids[:, :4], cache)
        before = held(model, cache)
        fails = mock.patch.object(call, "_read_token", mock.Mock(side_effect=RuntimeError("none left")))
        with fails, pytest.raises(RuntimeError, match="none left"):
            call(input_ids=ids[:, 4:5], **{CACHE: cache})
        assert held(model, cache) == before
        with pytest.raises(ValueError, match="ids must be from 0 to"):
            call(input_ids=torch.tensor([[10_000]]), **{CACHE: cache})
        with pytest.raises(ValueError, match="cache holds 1 sequences, the input 2"):
            call(input_ids=ids[:, :1].expand(2, 1), **{CACHE: cache})
        with pytest.raises(ValueError, match="logits_to_keep=-1"):
            call(input_ids=ids[:, 4:5], logits_to_keep=-1, **{CACHE: cache})
        assert held(model, cache) == before
        expected = stream(model, ids, [1] * L)[0][:, 4:]
        assert_close(call(input_ids=ids[:, 4:5], **{CACHE: cache}).logits, expected)


def test_a_step_that_is_interrupted_late_changes_nothing():
    """After all was computed, and before anybody was told."""
    model = sleeper("llama/sliding+sink/N2/all/gate").eval()
    for first in (1, 3):  # into buffers that have just been filled, and into some that are ahead of the value
        call, cache, ids = compiled(model), StaticSleepCache(), tokens(L)[None]
        with torch.no_grad():
            one_by_one(call, ids[:, :first], cache)
            step = call._read_token

            def interrupted(*arguments, step=step):
                step(*arguments)
                raise KeyboardInterrupt

            with mock.patch.object(call, "_read_token", interrupted), pytest.raises(KeyboardInterrupt):
                call(input_ids=ids[:, :1], **{CACHE: cache})
            mine = one_by_one(call, ids[:, first:], cache)
            assert_close(mine, stream(model, ids, [1] * L)[0][:, first:])


def test_settings_that_change_in_the_middle_of_a_window():
    """Buffers of another size, and more KV than the eviction of now would have left."""
    model = sleeper("llama/sliding/N1/all").eval()
    changes = [{"window_size": L + 4}, {"eviction": "hard"}, {"num_sink_tokens": 0}]
    for change in changes:
        call, static, plain = compiled(model), StaticSleepCache(), SleepCache()
        ids = tokens(4 * L)[None]
        with torch.no_grad():
            assert_close(one_by_one(call, ids[:, : L + 2], static), stream(model, ids[:, : L + 2], [L + 2], plain)[0])
            assert static.is_in_place
            with model.sleeping(**change):
                mine = one_by_one(call, ids[:, L + 2 :], static)
                assert_close(mine, stream(model, ids[:, L + 2 :], [1] * (3 * L - 2), plain)[0])


def test_a_pad_is_no_token_of_a_row_alone():
    model = sleeper("llama/hard/N2/all").eval()
    call, static, plain = compiled(model), StaticSleepCache(), SleepCache()
    with torch.no_grad():
        for column, real in enumerate((1, 1, 0, 1)):
            token, mask = tokens(4)[None, column : column + 1], torch.tensor([[real]])
            expected = model(token, attention_mask=mask, cache=plain).logits
            assert_close(call(input_ids=token, attention_mask=mask, **{CACHE: static}).logits, expected)
    assert_same_states(states(model, static), states(model, plain))
    assert static.memory.counters == plain.memory.counters


def test_modules_that_are_replaced_are_seen():
    """As PEFT replaces the blocks and puts adapters into the base, after a token was decoded without."""
    model = make_model("llama", sleep_config("llama", between="gate")).eval()
    call, ids = compiled(model), tokens(9)[None]
    with torch.no_grad():
        one_by_one(call, ids, StaticSleepCache())
        wrapped = get_peft_model(model, sleep_lora_config(model)).eval()
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        expected = stream(model, ids, [1] * 9)[0]
        assert_close(one_by_one(call, ids, StaticSleepCache()), expected, 1e-5)
        assert wrapped.merge_and_unload() is model
        assert_close(one_by_one(call, ids, StaticSleepCache()), expected, 1e-4)


def test_a_copy_has_a_call_of_its_own():
    model = make_model("llama", sleep_config("llama")).eval()
    config = CompileConfig(backend="eager")
    with torch.no_grad():
        one_by_one(model.get_compiled_call(config), tokens(3)[None], StaticSleepCache())
        twin = copy.deepcopy(model)
        call = model.get_compiled_call(config)
        del model
        one_by_one(twin.get_compiled_call(config), tokens(3)[None], StaticSleepCache())
        gc.collect()
        with pytest.raises(ReferenceError, match="the model of this compiled call is gone"):
            call(input_ids=tokens(1)[None])


def test_what_is_not_finite_stays_in_its_conversation():
    model = sleeper("llama/hard/N2/all").eval()
    call, cache, ids = compiled(model), StaticSleepCache(), tokens(L)[None]
    with torch.no_grad():
        one_by_one(call, ids, cache)
        for pair in cache._buffers.carried:
            for t in pair:
                t.fill_(torch.nan)
        cache.memory = stream(model, ids[:, :1], [1])[1].memory
        assert_close(one_by_one(call, ids[:, 1:], cache), stream(model, ids, [1] * L)[0][:, 1:])
        assert cache._held is None  # and the value is kept by nobody
        cache.reset()
        assert cache.num_bytes() == len(cache) == 0


def test_autocast_that_ends_is_seen():
    """KV in 16 bits is continued in 32 as the values are, which are joined, and not written into each other."""
    model = make_model("llama", sleep_config("llama", window_size=16)).eval()
    call, static, plain, ids = compiled(model), StaticSleepCache(), SleepCache(), tokens(9)[None]
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            for cache in (static, plain):
                model(ids[:, :4], cache=cache)
            expected = model(ids[:, 4:5], cache=plain).logits
            assert_close(call(input_ids=ids[:, 4:5], **{CACHE: static}).logits, expected, 1e-2)
        assert static.is_in_place
        expected = model(ids[:, 5:6], cache=plain).logits
        assert_close(call(input_ids=ids[:, 5:6], **{CACHE: static}).logits, expected, 1e-2)


def test_it_continues_from_a_file():
    """A memory that was saved, and a mask or an empty `logits_to_keep` beside it."""
    model = sleeper("llama/sliding/N2/all").eval()
    _, plain = stream(model, tokens(L + 2)[None], [L + 2])
    static = StaticSleepCache.of(SleepState.from_cache(model, plain).to_cache(model))
    config, more = CompileConfig(backend=Counting()), torch.cat((tokens(L + 2), tokens(2, 5)))[None]
    options = GREEDY | {"max_new_tokens": L}
    said = model.generate(more, cache_implementation="static", compile_config=config, **{CACHE: static}, **options)
    assert config.backend.graphs == 1
    assert torch.equal(said, model.generate(more, **{CACHE: plain}, **options))
    with torch.no_grad():
        nothing = torch.empty(0, dtype=torch.long)
        call = model.get_compiled_call(config)
        assert call(input_ids=tokens(1)[None], logits_to_keep=nothing, **{CACHE: static}).logits.shape[1] == 0


def test_settings_that_change_are_seen():
    """Another window, and another number of passes; the graph of the one is not the graph of the other."""
    model = sleeper("llama/sliding/N1/all").eval()
    call = compiled(model)
    with torch.no_grad():
        for settings in ({}, {"window_size": L + 2}, {"sleep_passes": 3, "eviction": "hard"}):
            with model.sleeping(**settings):
                ids = tokens(3 * L)[None]
                assert_close(one_by_one(call, ids, StaticSleepCache()), stream(model, ids, [1] * (3 * L))[0])


def test_what_is_no_step_is_the_model_itself():
    """Several tokens, gradients, training, hidden states, another cache: as without."""
    model, backend = sleeper("llama/hard/N2/all").eval(), Counting()
    call, ids = compiled(model, backend), tokens(2 * L)[None]
    with torch.no_grad():
        cache, other = StaticSleepCache(), StaticSleepCache()
        assert torch.equal(call(input_ids=ids, **{CACHE: cache}).logits, model(ids, cache=other).logits)
        one = ids[:, :1]
        hidden = call(input_ids=one, skip_head=True, **{CACHE: cache}).last_hidden_state
        assert torch.equal(hidden, model(one, cache=other, skip_head=True).last_hidden_state)
        assert torch.equal(call(one, cache=SleepCache()).logits, model(one).logits)
        assert isinstance(call(input_ids=one, return_dict=False, **{CACHE: cache}), tuple)
    loss = call(input_ids=one, labels=one, **{CACHE: cache}).loss
    assert loss is not None
    assert call(input_ids=one, **{CACHE: StaticSleepCache()}).logits.requires_grad
    assert backend.graphs == 0


def test_it_compiles_where_it_is_asked_to():
    """On a CPU transformers compiles nothing by itself; a config asks for it."""
    model, backend = sleeper("llama/hard/N2/all").eval(), Counting()
    options = GREEDY | {"max_new_tokens": 4, "return_dict_in_generate": True}
    made = model.generate(tokens(3)[None], cache_implementation="static", **options).cache
    assert isinstance(made, StaticSleepCache)
    assert made._buffers is None
    config = CompileConfig(backend=backend)
    given = model.generate(tokens(3)[None], compile_config=config, **{CACHE: StaticSleepCache()}, **options).cache
    assert given._buffers is not None
    assert backend.graphs == 1
    assert config._compile_all_devices is None
    assert model.get_compiled_call(config) is model.get_compiled_call(CompileConfig(backend=backend))
    assert model.get_compiled_call(config) is not model.get_compiled_call(CompileConfig(backend="eager"))


def test_a_model_whose_weights_move_is_not_compiled(caplog):
    """As with device_map, whose hooks no graph can hold."""
    compiling.logger.warning_once.cache_clear()
    model, backend = make_model("llama", sleep_config("llama")).eval(), Counting()
    ids = tokens(5)[None]
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with torch.no_grad():
        mine = one_by_one(compiled(model, backend), ids, StaticSleepCache())
        assert torch.equal(mine, stream(model, ids, [1] * 5)[0])
    assert backend.graphs == 0
    assert "Nothing is compiled: accelerate moves this model's weights" in caplog.text


@pytest.mark.parametrize("compiles", [False, True])
def test_a_quantised_base_is_compiled_where_its_quantizer_says_so(caplog, compiles):
    """transformers' own check looks for a quantizer on the model that generates, and ours is on its base."""
    compiling.logger.warning_once.cache_clear()
    model, backend = make_model("llama", sleep_config("llama")).eval(), Counting()
    model.lm.hf_quantizer = BnbQuantizer(BitsAndBytesConfig(load_in_8bit=True))
    with torch.no_grad(), mock.patch.object(BnbQuantizer, "is_compileable", compiles):
        one_by_one(compiled(model, backend), tokens(5)[None], StaticSleepCache())
    assert backend.graphs == compiles
    assert ("Nothing is compiled: Bnb8BitHfQuantizer" in caplog.text) is not compiles


def test_attention_that_takes_no_mask_is_refused():
    model = make_model("llama", sleep_config("llama")).eval()
    call, cache = compiled(model), StaticSleepCache()
    with torch.no_grad():
        model(tokens(2)[None], cache=cache)
        model.lm.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match=r"attn_implementation='flash_attention_2' .* fixed buffers.*sdpa"):
            call(input_ids=tokens(1)[None], **{CACHE: cache})


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own, as inductor loads
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_12_with_inductor():
    """The backend that people use: float32, sinks, a sliding window, rows of which one has ended."""
    model = sleeper("llama/sliding+sink/N2/1-3", torch.float32).eval()
    call, static, plain = model.get_compiled_call(CompileConfig(fullgraph=True)), StaticSleepCache(), SleepCache()
    ids = torch.stack((tokens(3 * L, 1), tokens(3 * L, 2)))
    with torch.no_grad():
        for column, token in enumerate(ids.split(1, 1)):
            mask = torch.tensor([[1], [int(column < L + 3)]])
            expected = model(token, attention_mask=mask, cache=plain).logits
            mine = call(input_ids=token, attention_mask=mask, **{CACHE: static}).logits
            assert_close(mine, expected, 1e-4)
        for row in (0, 1):
            assert_same_states(states(model, static, row), states(model, plain, row), 1e-4)


def test_an_eviction_of_anothers_own():
    """Fixed buffers are as wide as any style says that it can become."""

    class Half(Eviction):
        def __init__(self, window_size, num_sink_tokens=0):
            super().__init__(window_size, num_sink_tokens)
            self.recent = window_size // 2

    model = sleeper("llama/hard/N2/all").eval()
    call, static, plain = compiled(model), StaticSleepCache(), SleepCache()
    halving = mock.patch.object(type(model.config.sleep), "make_eviction", lambda sleep: Half(sleep.window_size))
    with halving, torch.no_grad():
        for token in tokens(4 * L)[None].split(1, 1):
            expected = model(token, cache=plain).logits
            assert_close(call(input_ids=token, **{CACHE: static}).logits, expected)
    assert static.is_in_place
