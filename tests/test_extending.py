"""Classes registered from outside the package obey the laws: the files of examples/extend, one for each open axis."""

import dataclasses
import itertools
import json
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import reference
import torch
from families import _COMMON, make_base, randomize, sleep_config, tokens
from families import exact as exact_floats
from helpers import (
    L,
    T,
    assert_close,
    assert_same_states,
    loss_and_gradients,
    pad,
    states,
    stream,
    with_memory_of,
)
from reference import reference_loss, reference_run
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from hf_sleep import SleepCache, SleepConfig, SleepForCausalLM, SleepState, register_base
from hf_sleep.bases.gated_delta_net import Qwen3NextDecoder
from hf_sleep.compat import CHECKPOINTING
from hf_sleep.engine import UntilSettled, WithinSeconds
from hf_sleep.engine.passes import change
from hf_sleep.placement import lengths_in_step
from hf_sleep.registry import BASES, BETWEEN, BLOCKS, EVICTIONS, PASS_POLICIES

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "examples" / "extend").glob("*.py"))
REGISTRIES = (BASES, BETWEEN, BLOCKS, EVICTIONS, PASS_POLICIES)
PHI = _COMMON | {"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-3}


def imported(file: Path):
    """A file of the examples as a module, which registers what it defines."""
    spec = util.spec_from_file_location(f"extend_{file.stem}", file)
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def modules():
    """The examples, registered here and gone after it; the reference knows their twins."""
    before = [dict(registry._classes) for registry in REGISTRIES]
    found = {file.stem: imported(file) for file in FILES}
    reference.EVICTIONS["recent"] = lambda window: (3, None)
    reference.BETWEEN["mean"] = lambda step, z, e: (z + e) / 2
    reference.MIXERS["LinearAttention"] = linear_attention
    yield found
    for registry, classes in zip(REGISTRIES, before, strict=True):
        registry._classes = classes
    del reference.EVICTIONS["recent"], reference.BETWEEN["mean"], reference.MIXERS["LinearAttention"]


@pytest.fixture
def exact():
    with exact_floats():
        yield


def linear_attention(m, x, S, tail, decays):
    """Token by token on x `[T, C]`: what the block of the examples does at once."""
    outputs = []
    for token in m.qkv_proj(x):
        q, k, v = token.view(m.num_heads, -1).split((m.head_dim, m.head_dim, m.head_v_dim), -1)
        S = S + torch.einsum("hk,hv->hkv", k, v)
        outputs.append(torch.einsum("hkv,hk->hv", S, q).flatten())
    return m.o_proj(torch.stack(outputs)), (S, tail)


# Of each axis: the base, and what it is slept with.
AXES = {
    "base_family": ("phi", {"eviction": "sliding", "num_sink_tokens": 2, "sleep_passes": 3}),
    "between": ("llama", {"between": "mean", "sleep_passes": 3}),
    "between, sliding": ("llama", {"between": "mean", "sleep_passes": 2, "eviction": "sliding", "loop_layers": (1, 3)}),
    "block": ("llama", {"block_kind": "linear_attention", "sleep_passes": 2, "loop_layers": (0, 2)}),
    "block, sliding": ("gemma3", {"block_kind": "linear_attention", "sleep_passes": 3, "eviction": "sliding"}),
    "eviction": ("llama", {"eviction": "recent", "sleep_passes": 2}),
    "eviction, sinks": ("gemma3", {"eviction": "recent", "num_sink_tokens": 2, "sleep_passes": 3}),
}
POLICIES = {
    "while it grows": lambda modules: modules["pass_policy"].WhileGrowing(cap=4),
    "until settled": lambda modules: UntilSettled(cap=5, tolerance=0.3),
    "within seconds": lambda modules: WithinSeconds(seconds=0.0, cap=3),
}
in_float64 = pytest.mark.usefixtures("exact")
each_axis = pytest.mark.parametrize("axis", AXES)
each_policy = pytest.mark.parametrize("policy", POLICIES)


def base_of(family: str, dtype: torch.dtype):
    if family != "phi":
        return make_base(family, dtype)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi", **PHI), attn_implementation="sdpa")
    randomize(base, 0)
    return base.to(dtype).eval()


def slept(axis: str, dtype: torch.dtype = torch.double, trained: bool = True, **fields) -> SleepForCausalLM:
    """The model of an axis."""
    family, settings = AXES[axis]
    sleep = sleep_config(family, **({"window_size": L} | settings | fields))
    model = SleepForCausalLM.from_base(base_of(family, dtype), sleep)
    if trained:
        randomize(model.fast_weights, 1)
    return model.to(dtype).eval()


# The files.


def test_there_is_a_short_file_for_every_axis():
    assert [file.stem for file in FILES] == ["base_family", "between", "block", "eviction", "pass_policy"]
    assert all(len(file.read_text(encoding="utf-8").splitlines()) <= 30 for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_runs_by_itself(file):
    subprocess.run([sys.executable, "-W", "ignore", file], check=True, capture_output=True, timeout=300, cwd=ROOT)


# The laws.


@each_axis
def test_1_an_untrained_retrofit_is_the_base_bit_for_bit(axis):
    model, ids = slept(axis, torch.float, trained=False, window_size=16), tokens(16)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base_of(AXES[axis][0], torch.float)(ids).logits)


@in_float64
@each_axis
def test_3_logits_states_and_gradients_are_those_of_algorithm_1(axis):
    model, ids = slept(axis), tokens(T)
    with torch.no_grad():
        out, run = model(ids[None], use_cache=True), reference_run(model, ids)
    assert_close(out.logits[0], run.logits)
    assert_same_states(states(model, out.cache), run.memory)
    model.train()
    loss, gradients = loss_and_gradients(model, model(ids[None], labels=ids[None]).loss)
    expected_loss, expected = loss_and_gradients(model, reference_loss(model, [ids], [ids]))
    assert_close(loss, expected_loss)
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient, what=name)
    getattr(model, f"{CHECKPOINTING}_enable")()
    again, gradients = loss_and_gradients(model, model(ids[None], labels=ids[None]).loss)
    assert_close(again, loss, 1e-12)
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient, what=f"{name}, with checkpointing")


@in_float64
@each_axis
def test_4_any_split_into_calls_is_the_same(axis):
    model, ids = slept(axis), tokens(T)[None]
    with torch.no_grad():
        whole, cache = stream(model, ids, [T])
        state = states(model, cache)
        for sizes in ([1] * T, [4, 9, 3, 1], [T - L] + [1] * L):
            logits, cache = stream(model, ids, sizes)
            assert_close(logits, whole, what=f"logits of {sizes}")
            assert_same_states(states(model, cache), state)


@in_float64
@each_axis
def test_5_a_row_is_what_it_is_alone(axis):
    model, rows = slept(axis), [tokens(T, 1), tokens(2, 2), tokens(L + 1, 3)]
    for side in ("left", "right"):
        ids, mask = pad(rows, side)
        with torch.no_grad():
            out = model(ids, attention_mask=mask, use_cache=True)
            for r, row in enumerate(rows):
                run = reference_run(model, row)
                assert_close(out.logits[r][mask[r].bool()], run.logits)
                assert_same_states(states(model, out.cache, r), run.memory)


@in_float64
@in_float64
@each_axis
@pytest.mark.parametrize("policy", [3, UntilSettled(3, 0.0)], ids=str)
def test_5_rows_sleep_on_windows_of_different_fill(policy, axis):
    model, lengths = slept(axis), (L + 2, 1, 2 * L - 1)
    rows, more = [tokens(n, n) for n in lengths], torch.stack([tokens(3, seed) for seed in (7, 8, 9)])
    ids, mask = pad(rows, "right")
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True, sleep_passes=3).cache
        model.sleep(cache, sleep_passes=policy)
        logits = model(more, cache=cache, sleep_passes=3).logits
        for r, row in enumerate(rows):
            run = reference_run(model, torch.cat((row, more[r])), sleep_passes=3, sleep_after={len(row) - 1: 3})
            assert_close(logits[r], run.logits[len(row) :])
            assert_same_states(states(model, cache, r), run.memory)


@pytest.mark.parametrize("axis", ["between", "block"])
def test_6_after_a_hard_eviction_the_past_is_in_the_fast_weights_alone(axis):
    model, question = slept(axis), tokens(L + 2, 3)[None]
    with torch.no_grad():
        (_, mine), (_, theirs) = (stream(model, tokens(2 * L, seed)[None], [2 * L]) for seed in (1, 2))
        model.sleep(mine)
        model.sleep(theirs)
        expected = model(question, cache=theirs.fork()).logits
        assert (model(question, cache=mine.fork()).logits - expected).abs().max() > 1e-2
        assert torch.equal(model(question, cache=with_memory_of(mine, theirs)).logits, expected)


@in_float64
@each_axis
def test_7_memory_is_bounded_whatever_was_read(axis):
    model, ids = slept(axis), tokens(9 * L, 4)[None]
    bound, cache, held = model.config.sleep.make_eviction().most_retained + L, SleepCache(), []
    with torch.no_grad():
        for t in range(9 * L):
            model(ids[:, t : t + 1], cache=cache)
            held.append((cache.max_kv_length, cache.num_bytes()))
            assert cache.memory.counters[0].position <= model.config.sleep.max_position
    assert max(held[3 * L :]) == max(held)
    assert max(length for length, _ in held) == bound


@each_axis
def test_9_saving_and_loading_is_bit_equal(axis, tmp_path):
    model, ids = slept(axis, torch.float), tokens(T)[None]
    model.save_pretrained(tmp_path / "model")
    loaded = SleepForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.config.sleep == model.config.sleep
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()  # mapped from the file they may lie unaligned
    with torch.no_grad():
        out = model(ids, use_cache=True)
        assert torch.equal(loaded(ids).logits, out.logits)
        SleepState.from_cache(model, out.cache).save(tmp_path / "state")
        cache = SleepState.load(tmp_path / "state").to_cache(loaded)
        assert torch.equal(loaded(ids, cache=cache).logits, model(ids, cache=out.cache).logits)


def test_9_a_state_is_refused_where_something_else_lies_between_passes():
    model = slept("between", torch.float)
    other = slept("between", torch.float, between="none")
    with torch.no_grad():
        state = SleepState.from_cache(model, model(tokens(T)[None], use_cache=True).cache)
    with pytest.raises(ValueError, match="saved with between='mean', this model has between='none'"):
        state.to_cache(other)


# Policies, whose N is theirs to say.


def passes_of(model, ids, **kwargs):
    """The output of a call, and N of each of its sleeps by row."""
    told: list[tuple[int, int, int]] = []
    with torch.no_grad(), model.on_sleep(lambda e: told.append((e.row, e.tokens, e.sleep_passes))):
        return model(ids, use_cache=True, **kwargs), sorted(told)


@in_float64
@each_policy
def test_a_policy_says_how_often_each_row_sleeps_on_each_window(policy, modules):
    model = slept("block", block_kind="jet", sleep_passes=POLICIES[policy](modules))
    rows = [tokens(T, 1), tokens(2 * L + 1, 5), tokens(L + 1, 3)]
    ids, mask = pad(rows, "right")
    out, together = passes_of(model, ids, attention_mask=mask)
    for r, row in enumerate(rows):
        alone, told = passes_of(model, row[None])
        assert [(t, n) for _, t, n in told] == [(t, n) for b, t, n in together if b == r]
        by_token = [1] * len(row)
        for _, t, n in told:
            by_token[t] = n
        run = reference_run(model, row, sleep_passes=by_token)
        assert_close(alone.logits[0], run.logits)
        assert_close(out.logits[r, : len(row)], run.logits)
        assert_same_states(states(model, out.cache, r), run.memory)
        with torch.no_grad():
            logits, _ = stream(model, row[None], [1] * len(row))
        assert_close(logits[0], run.logits)


def test_a_policy_is_asked_with_what_the_passes_wrote(modules):
    model, policy = slept("block", block_kind="jet"), modules["pass_policy"].WhileGrowing(cap=9)
    written = []
    with torch.no_grad(), model.register_pass_hook(lambda event: written.append([s[0] for s in event.written])):
        _, told = passes_of(model, tokens(L + 1)[None], sleep_passes=policy)
    norms = [sum(s.norm() for s in states) for states in written]
    assert told == [(0, L, len(written))]
    assert 2 <= len(written) <= 9
    assert all(after > before for before, after in itertools.pairwise(norms[:-1]))
    assert len(written) == 9 or norms[-1] <= norms[-2]


def test_settled_is_a_matter_of_tolerance():
    model, ids = slept("block", block_kind="jet"), tokens(L + 1)[None]
    written = []
    with torch.no_grad(), model.register_pass_hook(lambda event: written.append([s[0] for s in event.written])):
        passes_of(model, ids, sleep_passes=6)
    changes = [change(*pair) for pair in itertools.pairwise(written)]
    for tolerance in (0.0, *changes, 10.0):
        expected = next((n for n, moved in enumerate(changes, 2) if moved <= tolerance), 6)
        assert passes_of(model, ids, sleep_passes=UntilSettled(6, tolerance))[1] == [(0, L, expected)]
    assert passes_of(model, ids, sleep_passes=UntilSettled(1))[1] == [(0, L, 1)]


def test_a_budget_of_time_bounds_the_passes():
    model, ids = slept("block", block_kind="jet"), tokens(L + 1)[None]
    assert passes_of(model, ids, sleep_passes=WithinSeconds(0.0))[1] == [(0, L, 1)]
    assert passes_of(model, ids, sleep_passes=WithinSeconds(1e6, cap=3))[1] == [(0, L, 3)]
    for wrong in (lambda: WithinSeconds(-1.0), lambda: UntilSettled(0), lambda: UntilSettled(tolerance=float("nan"))):
        with pytest.raises(ValueError, match="cannot work"):
            wrong()


@each_policy
def test_generate_takes_a_policy(policy, modules):
    model = slept("block", block_kind="jet", sleep_passes=1)
    told: list[tuple[int, int]] = []
    settings = {"max_new_tokens": 2 * L, "do_sample": False, "sleep_passes": POLICIES[policy](modules)}
    with torch.no_grad(), model.on_sleep(lambda event: told.append((event.tokens, event.sleep_passes))):
        answer = model.generate(tokens(L + 2)[None], **settings)
        said = list(told)
        told.clear()
        logits = model(answer, sleep_passes=settings["sleep_passes"]).logits
    assert said == told
    assert len(said) == 3
    assert torch.equal(logits[0, L + 1 : -1].argmax(-1), answer[0, L + 2 :])


def test_ranks_that_read_in_step_cannot_look_at_the_data():
    with pytest.raises(ValueError, match="sleep_passes is a policy that looks at the data, and with sharded weights"):
        lengths_in_step(7, torch.device("cpu"), depends_on_data=True)


def test_marks_are_refused_where_ranks_must_sleep_in_step():
    with pytest.raises(ValueError, match=r"sleep_after with sharded weights .* train with DDP"):
        lengths_in_step(7, torch.device("cpu"), depends_on_data=False, has_marks=True)


def test_a_card_imports_all_that_its_model_needs(modules, tmp_path):
    model = slept("base_family", torch.float, eviction="recent", sleep_passes=modules["pass_policy"].WhileGrowing())
    model.config.base_module = BASES.module_of("phi")
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for name in ("base_family", "eviction", "pass_policy"):
        assert f"\nimport extend_{name}  # registers" in card


@each_policy
def test_a_policy_is_saved_with_its_fields(policy, modules, tmp_path):
    model = slept("block", torch.float, block_kind="jet", sleep_passes=POLICIES[policy](modules))
    model.save_pretrained(tmp_path)
    assert SleepForCausalLM.from_pretrained(tmp_path).config.sleep == model.config.sleep
    assert SleepConfig.from_dict(json.loads(json.dumps(model.config.sleep.to_dict()))) == model.config.sleep
    with model.sleeping(sleep_passes=2):
        assert model.config.sleep.sleep_passes == 2
    assert model.config.sleep.sleep_passes == POLICIES[policy](modules)


def test_a_policy_that_nobody_could_load_is_refused(modules):
    @dataclasses.dataclass(frozen=True)
    class Unregistered(modules["pass_policy"].WhileGrowing):
        pass

    with pytest.raises(ValueError, match="Unregistered cannot be saved: make it a frozen dataclass and register"):
        SleepConfig(sleep_passes=Unregistered())
    model = slept("block", block_kind="jet")
    assert passes_of(model, tokens(L + 1)[None], sleep_passes=Unregistered(cap=2))[1][0][2] == 2
    for wrong in (0, True, 1.5, "2", {"policy": "nobody"}, {"policy": "fixed", "more": 1}):
        with pytest.raises(ValueError, match=r"SleepConfig\.sleep_passes="):
            SleepConfig(sleep_passes=wrong)


# Another process.

SAVED = {
    "base_family": "model_type='phi'",
    "between": "SleepConfig.between='mean'",
    "block": "SleepConfig.block_kind='linear_attention'",
    "eviction": "SleepConfig.eviction='recent'",
}
LOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
{imports}
from hf_sleep import AutoModelForSleepLM
print(AutoModelForSleepLM.from_pretrained(sys.argv[2]).config.sleep.window_size)
"""


@pytest.mark.parametrize("name", [*SAVED, "pass_policy"])
def test_a_process_without_the_import_is_told_which_one_is_missing(name, modules, tmp_path, monkeypatch):
    module = modules[name]
    for registry in REGISTRIES:  # as an import by its name would have it
        for kind in registry._classes.values():
            if kind.__module__ == module.__name__:
                monkeypatch.setattr(kind, "__module__", name)
    fields = {"block_kind": "jet", "sleep_passes": module.WhileGrowing()} if name == "pass_policy" else {}
    model = slept("block" if name == "pass_policy" else name, torch.float, **fields)
    model.config.base_module = BASES.module_of(model.config.text_config.model_type)
    model.save_pretrained(tmp_path)
    outcomes = {}
    for imports in ("", f"import {name}"):
        program = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            LOAD.format(imports=imports),
            str(FILES[0].parent),
            str(tmp_path),
        ]
        outcomes[imports] = subprocess.run(program, capture_output=True, text=True, timeout=300)
    missing, present = outcomes.values()
    assert present.returncode == 0, present.stderr
    assert present.stdout.split()[-1] == str(L)
    assert missing.returncode == 1
    assert SAVED.get(name, "SleepConfig.sleep_passes=") in missing.stderr.splitlines()[-1]
    assert f"import {name} first" in missing.stderr.splitlines()[-1]


# A hybrid whose layers have another name.


class OutsideConfig(Qwen3NextConfig):
    model_type = "outside_hybrid"


class OutsideForCausalLM(Qwen3NextForCausalLM):
    config_class = OutsideConfig


def test_a_hybrid_needs_no_linear_attention_in_its_config():
    @register_base("outside_hybrid")
    class Outside(Qwen3NextDecoder):
        recurrent_kinds = frozenset({"memory"})

        @classmethod
        def layer_kinds(cls, config):
            return ["memory" if kind == "linear_attention" else kind for kind in config.layer_types]

    stock = make_base("qwen3_next", torch.double)
    base = OutsideForCausalLM(OutsideConfig(**stock.config.to_dict() | {"model_type": "outside_hybrid"}))
    base.load_state_dict(stock.state_dict())
    base.set_experts_implementation("eager")
    sleep = SleepConfig(window_size=L, sleep_passes=2)
    ours = SleepForCausalLM.from_base(base.double().eval(), sleep)
    plain = SleepForCausalLM.from_base(stock, sleep)
    assert len(ours.fast_weights) == 0
    with torch.no_grad():
        assert torch.equal(ours(tokens(T)[None]).logits, plain(tokens(T)[None]).logits)


def test_a_name_is_taken_once(modules):
    with pytest.raises(ValueError, match=r"register_eviction\('hard'\): hf_sleep.engine.eviction.Hard has that name"):
        EVICTIONS.register("hard")(modules["eviction"].Recent)
    again = imported(FILES[3])  # as a notebook's cell that is run twice
    assert EVICTIONS["recent"] is again.Recent


def test_what_lies_between_passes_was_built_and_is_no_dial():
    model = slept("between")
    with pytest.raises(ValueError, match=r"SleepConfig\.between='none' cannot work: .* between='mean'. Leave it out"):
        model.sleeping(between="none").__enter__()
    assert model.config.sleep.between == "mean"
