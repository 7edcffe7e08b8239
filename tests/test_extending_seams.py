"""Where a class from outside the package meets saving, PEFT, training and other settings."""

import dataclasses
import itertools

import pytest
import torch
from families import make_base, make_model, sleep_config, tokens
from helpers import L, T
from peft import get_peft_model
from torch import nn

from hf_sleep import (
    Between,
    Eviction,
    FastWeightMixer,
    FastWeights,
    PassPolicy,
    SleepCache,
    SleepConfig,
    SleepForCausalLM,
    SleepState,
    UntilSettled,
    WithinSeconds,
    register_between,
    register_block,
    register_eviction,
    register_pass_policy,
    sleep_lora_config,
)
from hf_sleep.info import describe
from hf_sleep.registry import BETWEEN, BLOCKS, EVICTIONS, PASS_POLICIES
from hf_sleep.training import freeze_all_but_fast_weights


class Gate(Between):
    """A gate whose first values are set as any module of torch sets them."""

    needs_loop_input = True

    def __init__(self, hidden_size):
        super().__init__(hidden_size)
        self.gate = nn.Parameter(torch.full((hidden_size,), 0.25))
        self.mix = nn.Linear(hidden_size, hidden_size, bias=False)
        self.register_buffer("strength", torch.tensor([0.5]))

    def init_weights(self, generator=None):
        self.gate.data.fill_(0.25)
        with torch.no_grad():
            self.mix.weight.zero_()

    def forward(self, z, e):
        return e + self.gate * self.strength * (z - e) + self.mix(z)


class Bare(FastWeightMixer):
    """A mixer that sets its first values in place, and has one that `init_weights` does not know."""

    def __init__(self, hidden_size, num_heads, head_dim, expand_v, conv_size):
        super().__init__(hidden_size, num_heads, head_dim, expand_v, conv_size)
        self.scale = nn.Parameter(torch.ones(1))
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def empty(self, batch_size, device, dtype):
        state = torch.zeros(batch_size, 1, 1, 1, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return FastWeights(state, state.new_zeros(batch_size, 1, 1, dtype=dtype))

    def forward(self, x, fast_weights, lengths=None, decays=True):
        real = torch.ones(x.shape[:2], device=x.device)
        if lengths is not None:
            real = (torch.arange(x.shape[1], device=x.device) < lengths[:, None]).to(x.dtype)
        S = fast_weights.recurrent_state + (x.mean(-1) * real).sum(1).view(-1, 1, 1, 1)
        return self.o_proj(x * self.scale * S[..., 0].to(x.dtype)), FastWeights(S, fast_weights.conv_state)

    def init_weights(self, std, generator=None):
        self.scale.data.fill_(1.0)
        self.o_proj.weight.data.zero_()


@pytest.fixture(autouse=True)
def _registered():
    register_between("gate_of_a_test")(Gate)
    register_block("bare_of_a_test")(Bare)
    yield
    for registry in (BETWEEN, BLOCKS, EVICTIONS, PASS_POLICIES):
        for name in [name for name, kind in registry._classes.items() if kind.__module__ == __name__]:
            del registry._classes[name]


def gated(dtype=torch.float, **fields) -> SleepForCausalLM:
    sleep = sleep_config("llama", **({"window_size": L, "between": "gate_of_a_test"} | fields))
    return SleepForCausalLM.from_base(make_base("llama", dtype), sleep)


# First values, saving and loading.


def test_fresh_weights_are_those_of_the_module_whatever_draws_them():
    base, sleep = make_base("llama", torch.bfloat16), sleep_config("llama", between="gate_of_a_test", window_size=L)
    state = torch.get_rng_state()
    model = SleepForCausalLM.from_base(base, sleep)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.between.gate.unique().tolist() == [0.25]
    assert model.between.strength.tolist() == [0.5]
    assert model.between.strength.dtype == model.between.gate.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(tokens(T)[None]).logits.isfinite().all()


@pytest.mark.parametrize("only_sleep", [False, True])
def test_what_was_trained_survives_loading_however_first_values_are_set(only_sleep, tmp_path):
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base", attn_implementation="sdpa")
    fields = {"between": "gate_of_a_test", "block_kind": "bare_of_a_test"}
    model = SleepForCausalLM.from_base(base, sleep_config("llama", window_size=L, **fields))
    with torch.no_grad():
        for parameter in itertools.chain(model.fast_weights.parameters(), model.between.parameters()):
            parameter.fill_(3.0)
    model.save_pretrained(tmp_path / "model", only_sleep=only_sleep)
    loaded = SleepForCausalLM.from_pretrained(tmp_path / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_new_weights_alone_may_be_what_lies_between_passes(tmp_path):
    base = make_base("qwen3_next")
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base", attn_implementation="sdpa", experts_implementation="eager")
    sleep = SleepConfig(window_size=L, between="gate_of_a_test")
    model = SleepForCausalLM.from_base(base, sleep)
    assert not model.fast_weights
    model.save_pretrained(tmp_path / "model", only_sleep=True)
    loaded = SleepForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.between.gate, model.between.gate)


def test_a_policy_in_a_generation_config_is_saved(tmp_path):
    model = make_model("llama", sleep_config("llama", window_size=L))
    model.generation_config.sleep_passes = UntilSettled(cap=3)
    model.save_pretrained(tmp_path)
    loaded, told = SleepForCausalLM.from_pretrained(tmp_path), []
    with torch.no_grad(), loaded.on_sleep(lambda event: told.append(event.sleep_passes)):
        loaded.generate(tokens(L)[None], max_new_tokens=3, do_sample=False)
    assert told
    assert set(told) <= {2, 3}
    assert loaded.generation_config.sleep_passes == {"policy": "until_settled", "cap": 3, "tolerance": 0.01}


# PEFT and training.


def test_lora_trains_what_lies_between_passes_in_full():
    model = gated()
    adapted = get_peft_model(model, sleep_lora_config(model))
    assert any("between" in name and p.requires_grad for name, p in adapted.named_parameters())


def test_it_is_trained_with_the_fast_weights():
    model = gated()
    freeze_all_but_fast_weights(model)
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"between.gate", "between.mix.weight"} < learns
    assert all(name.startswith(("fast_weights.", "between.")) for name in learns)


def test_it_is_counted():
    config = make_base("llama").config
    plain, with_gate = (describe(config, sleep_config("llama", between=name)) for name in ("none", "gate_of_a_test"))
    added = sum(parameter.numel() for parameter in Gate(config.hidden_size).parameters())
    assert with_gate.added_parameters - plain.added_parameters == added
    assert with_gate.window_bytes > plain.window_bytes
    assert with_gate.sleep_flops > plain.sleep_flops


# A cache that was read with other settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loop_layers": (1, 3)}, r"read with loop_layers=\(0, 4\), the model has loop_layers=\(1, 3\) now"),
        ({"num_sink_tokens": 1}, "read with num_sink_tokens=0, the model has num_sink_tokens=1 now"),
        ({"window_size": 2}, "holds a window of 3 tokens, the model has window_size=2 now"),
    ],
)
def test_a_cache_is_not_continued_with_other_settings(settings, message):
    model, cache = make_model("llama", sleep_config("llama", window_size=L)), SleepCache()
    with torch.no_grad():
        model(tokens(L + 3)[None], cache=cache)
        before = cache.memory
        with model.sleeping(**settings):
            for use in (
                lambda: model(tokens(1)[None], cache=cache),
                lambda: model.sleep(cache),
                lambda: SleepState.from_cache(model, cache),
            ):
                with pytest.raises(ValueError, match=message):
                    use()
        assert cache.memory is before
        model(tokens(1)[None], cache=cache)


def test_a_mask_selects_rows():
    model, cache = make_model("llama", sleep_config("llama", window_size=L)), SleepCache()
    with torch.no_grad():
        model(torch.stack([tokens(3, 1), tokens(3, 2)]), cache=cache)
        alone = cache.fork()
        alone.batch_select_indices(torch.tensor([1]))
        cache.batch_select_indices(torch.tensor([False, True]))
        assert cache.batch_size == 1
        assert torch.equal(model(tokens(1)[None], cache=cache).logits, model(tokens(1)[None], cache=alone).logits)


# Policies that are written carelessly.


def test_bounds_are_those_of_the_policy_that_was_given():
    @dataclasses.dataclass(frozen=True)
    class Begun(PassPolicy):
        at_least: int = 2
        at_most: int | None = 4
        says: bool = False

        def begin(self):
            return dataclasses.replace(self, at_least=1, at_most=None)

        def another(self, number, before, after):
            return torch.tensor(self.says)

    model, told = make_model("llama", sleep_config("llama", window_size=L)), []
    with torch.no_grad(), model.on_sleep(lambda event: told.append(event.sleep_passes)):
        model(tokens(L + 1)[None], sleep_passes=Begun())
        model(tokens(L + 1)[None], sleep_passes=Begun(says=True))
        with pytest.raises(ValueError, match="its at_least=5 is above its at_most=4"):
            model(tokens(L + 1)[None], sleep_passes=Begun(at_least=5))
    assert told == [2, 4]


def test_a_budget_that_is_subclassed_is_still_the_subclass():
    class Once(WithinSeconds):
        def another(self, number, before, after):
            return False

    model, told = make_model("llama", sleep_config("llama", window_size=L)), []
    with torch.no_grad(), model.on_sleep(lambda event: told.append(event.sleep_passes)):
        model(tokens(L + 1)[None], sleep_passes=Once(seconds=1e6))
    assert told == [1]


def test_a_field_cannot_stand_for_the_policy():
    @register_pass_policy("of_a_test")
    @dataclasses.dataclass(frozen=True)
    class Named(PassPolicy):
        policy: str = "until_settled"

    with pytest.raises(ValueError, match="a field is called 'policy'"):
        SleepConfig(sleep_passes=Named())


def test_a_cell_that_is_run_again_leaves_live_models_as_they_are():
    def cell():
        @register_pass_policy("of_a_cell")
        @dataclasses.dataclass(frozen=True)
        class Cell(PassPolicy):
            def another(self, number, before, after):
                return False

        return Cell

    config = SleepConfig(sleep_passes=cell()())
    cell()
    assert config.to_dict()["sleep_passes"]["policy"] == "of_a_cell"


# Evictions and names.


def test_an_eviction_with_counters_of_its_own_is_kept_as_a_state(tmp_path):
    @register_eviction("of_a_test")
    class Few(Eviction):
        """Keeps two recent tokens, and one of a window that was cut short."""

        recent = 2

        def after(self, row):
            kept = super().after(row)
            return kept if row.fill == self.window_size else dataclasses.replace(kept, retained=min(1, kept.retained))

        def may_leave(self, row):
            return row.retained <= 2 and row.position < self.max_position

    model, cache = make_model("llama", sleep_config("llama", window_size=L, eviction="of_a_test")), SleepCache()
    with torch.no_grad():
        model(tokens(L + 2)[None], cache=cache)
        model.sleep(cache)
        assert cache.max_kv_length == 1
        SleepState.from_cache(model, cache).save(tmp_path / "state")
        again = SleepState.load(tmp_path / "state").to_cache(model)
        assert torch.equal(model(tokens(3)[None], cache=again).logits, model(tokens(3)[None], cache=cache).logits)


def test_a_decorator_needs_its_name():
    with pytest.raises(TypeError, match=r"@register_eviction needs a name: @register_eviction\('name'\)"):
        register_eviction(Eviction)
    with pytest.raises(ValueError, match="eviction 'nobody' is not known: it must be one of hard, sliding"):
        EVICTIONS["nobody"]
