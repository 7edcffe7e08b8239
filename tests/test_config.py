"""SleepConfig and SleepLMConfig: what cannot work says so, and what works survives its files."""

import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from itertools import pairwise

import pytest
from families import FAMILIES, HYBRIDS, MORE_FAMILIES, RELATIVES, make_base, make_config, sleep_config
from transformers import AutoConfig, LlamaConfig

from hf_sleep import JetNemotronConfig, OuroConfig, SleepConfig, SleepForCausalLM, SleepLMConfig, __version__
from hf_sleep.bases.decoder import adapter_of, middle_third, period_of
from hf_sleep.config import SETTINGS

# Settings, the field and value that the error must name, what it must say works, and settings that then do.
IMPOSSIBLE = {
    "window 0": ({"window_size": 0}, "window_size=0", "at least 2", {"window_size": 2}),
    "window 1": ({"window_size": 1}, "window_size=1", "at least 2", {"window_size": 2}),
    "window True": ({"window_size": True}, "window_size=True", "integer of at least 2", {"window_size": 2}),
    "window 2.5": ({"window_size": 2.5}, "window_size=2.5", "integer of at least 2", {"window_size": 2}),
    "window None": ({"window_size": None}, "window_size=None", "integer of at least 2", {"window_size": 2}),
    "passes 0": ({"sleep_passes": 0}, "sleep_passes=0", "at least 1", {"sleep_passes": 1}),
    "passes True": ({"sleep_passes": True}, "sleep_passes=True", "integer of at least 1", {"sleep_passes": 1}),
    "passes str": ({"sleep_passes": "2"}, "sleep_passes='2'", "integer of at least 1", {"sleep_passes": 2}),
    "eviction": ({"eviction": "soft"}, "eviction='soft'", "hard, sliding", {"eviction": "sliding"}),
    "eviction list": ({"eviction": ["hard"]}, "eviction=['hard']", "hard, sliding", {"eviction": "hard"}),
    "sinks -1": ({"num_sink_tokens": -1}, "num_sink_tokens=-1", "at least 0", {"num_sink_tokens": 0}),
    "sinks = window": (
        {"window_size": 4, "num_sink_tokens": 4},
        "num_sink_tokens=4",
        "less than window_size=4",
        {"window_size": 4, "num_sink_tokens": 3},
    ),
    "loop backwards": ({"loop_layers": (3, 1)}, "loop_layers=(3, 1)", "0 <= a < b", {"loop_layers": (1, 3)}),
    "loop empty": ({"loop_layers": (2, 2)}, "loop_layers=(2, 2)", "0 <= a < b", {"loop_layers": (2, 3)}),
    "loop below 0": ({"loop_layers": (-1, 2)}, "loop_layers=(-1, 2)", "0 <= a < b", {"loop_layers": (0, 2)}),
    "loop of one": ({"loop_layers": (0,)}, "loop_layers=(0,)", "(a, b)", {"loop_layers": (0, 1)}),
    "loop str": ({"loop_layers": "ab"}, "loop_layers='ab'", "tuple of integers", {"loop_layers": (0, 1)}),
    "loop int": ({"loop_layers": 3}, "loop_layers=3", "tuple of integers", {"loop_layers": (0, 3)}),
    "loop floats": ({"loop_layers": (0, 2.0)}, "loop_layers=(0, 2.0)", "tuple of integers", {"loop_layers": (0, 2)}),
    "loop too deep": ({"loop_layers": (0, 5)}, "loop_layers=(0, 5)", "b is at most 4", {"loop_layers": (0, 4)}),
    "kind": ({"block_kind": "mamba"}, "block_kind='mamba'", "gated_delta_net, jet", {"block_kind": "gated_delta_net"}),
    "blocks -1": ({"num_blocks": -1}, "num_blocks=-1", "at least 0", {"num_blocks": 1}),
    "blocks too many": ({"num_blocks": 5}, "num_blocks=5", "at most 4", {"num_blocks": 4}),
    "blocks 0": ({"num_blocks": 0}, "num_blocks=0", "at least one", {"num_blocks": 1}),
    "blocks twice": (
        {"num_blocks": 2, "block_layers": (1,)},
        "num_blocks=2",
        "block_layers lists 1: give one of the two",
        {"block_layers": (1,)},
    ),
    "layers unsorted": ({"block_layers": (2, 0)}, "block_layers=(2, 0)", "in order", {"block_layers": (0, 2)}),
    "layers twice": ({"block_layers": (1, 1)}, "block_layers=(1, 1)", "each once", {"block_layers": (1,)}),
    "layers below 0": ({"block_layers": (-1, 2)}, "block_layers=(-1, 2)", "from 0", {"block_layers": (0, 2)}),
    "layers too deep": ({"block_layers": (0, 4)}, "block_layers=(0, 4)", "0 to 3", {"block_layers": (0, 3)}),
    "layers str": ({"block_layers": "02"}, "block_layers='02'", "tuple of integers", {"block_layers": (0, 2)}),
    "heads 0": ({"block_num_heads": 0}, "block_num_heads=0", "at least 1", {"block_num_heads": 1}),
    "head_dim -8": ({"block_head_dim": -8}, "block_head_dim=-8", "at least 1", {"block_head_dim": 8}),
    "conv 1": ({"block_conv_size": 1}, "block_conv_size=1", "at least 2", {"block_conv_size": 2}),
    "expand 0": ({"block_expand_v": 0}, "block_expand_v=0", "positive", {"block_expand_v": 1}),
    "half-lives descending": (
        {"block_half_lives": (4.0, 1.0)},
        "block_half_lives=(4.0, 1.0)",
        "two positive numbers, the smaller one first",
        {"block_half_lives": (1.0, 4.0)},
    ),
    "half-life 0": ({"block_half_lives": (0, 1)}, "block_half_lives=(0, 1)", "positive", {"block_half_lives": (1, 1)}),
    "half-lives of one": ({"block_half_lives": (1,)}, "block_half_lives=(1,)", "two", {"block_half_lives": [1, 2.5]}),
    "half-life number": ({"block_half_lives": 2.0}, "block_half_lives=2.0", "two", {"block_half_lives": None}),
    "half-lives bool": ({"block_half_lives": (True, 2)}, "block_half_lives=(True, 2)", "two positive numbers", {}),
    "half-lives str": ({"block_half_lives": "ab"}, "block_half_lives='ab'", "two positive numbers", {}),
    "half-life inf": (
        {"block_half_lives": (1, float("inf"))},
        "block_half_lives=(1, inf)",
        "such as (0.25, 16.0)",
        {"block_half_lives": (1, 1e6)},
    ),
    "half-life nan": ({"block_half_lives": (float("nan"), 1)}, "block_half_lives=(nan, 1)", "positive", {}),
    "expand str": ({"block_expand_v": "2"}, "block_expand_v='2'", "positive number", {"block_expand_v": 2}),
}


def retrofit(**fields) -> SleepForCausalLM:
    return SleepForCausalLM.from_base(make_base("llama"), SleepConfig(**fields))


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_work_names_field_value_and_what_works(case):
    fields, named, advice, fixed = IMPOSSIBLE[case]
    with pytest.raises(ValueError, match="cannot work") as error:
        retrofit(**fields)
    assert f"SleepConfig.{named} cannot work" in str(error.value)
    assert advice in str(error.value)
    assert retrofit(**fixed).config.sleep.block_layers


@pytest.mark.parametrize(
    ("expand", "heads"),
    [
        (1.3, 2),
        (1.3, 1),
        (0.1, 1),
        (1.3, 4),
        (float("nan"), 2),
        (float("inf"), 2),
        (True, 2),
    ],
)
def test_a_value_width_that_is_no_whole_number_is_refused(expand, heads):
    with pytest.raises(ValueError, match=r"SleepConfig\.block_expand_v") as error:
        retrofit(block_expand_v=expand, block_head_dim=8, block_num_heads=heads)
    assert repr(expand) in str(error.value)


def test_a_value_width_that_is_a_whole_number_is_exact():
    mixer = retrofit(block_expand_v=1.25, block_head_dim=8, block_num_heads=3).fast_weights["1"].mixer
    assert (mixer.head_v_dim, mixer.value_dim) == (10, 30)


@pytest.mark.parametrize(
    ("eviction", "sinks", "most"), [("hard", 0, 2048), ("hard", 3, 2045), ("sliding", 0, 1024), ("sliding", 3, 1022)]
)
def test_a_window_beyond_the_bases_positions_is_refused_with_the_largest_that_works(eviction, sinks, most):
    base = make_base("llama").config
    settings = {"eviction": eviction, "num_sink_tokens": sinks}
    with pytest.raises(ValueError, match=rf"window_size={most + 1} cannot work: .* use at most {most}$"):
        SleepConfig(window_size=most + 1, **settings).resolve(base)
    assert SleepConfig(window_size=most, **settings).resolve(base).max_position <= base.max_position_embeddings


@pytest.mark.parametrize(("eviction", "most"), [("hard", 1023), ("sliding", 682)])
def test_sinks_that_leave_no_room_for_a_window_are_refused_with_the_most_that_work(eviction, most):
    base = make_base("llama").config
    with pytest.raises(ValueError, match=rf"num_sink_tokens=1500 cannot work: .* use at most {most}$"):
        SleepConfig(window_size=2000, num_sink_tokens=1500, eviction=eviction).resolve(base)
    SleepConfig(window_size=most + 1, num_sink_tokens=most, eviction=eviction).resolve(base)
    with pytest.raises(ValueError, match="cannot work"):
        SleepConfig(window_size=most + 2, num_sink_tokens=most + 1, eviction=eviction).resolve(base)


def test_what_was_left_open_is_filled_from_the_base():
    """The middle third loops and holds one block per four layers of the base, a third as wide as the base."""
    base = LlamaConfig(num_hidden_layers=16, hidden_size=64, num_attention_heads=4)
    sleep = SleepConfig().resolve(base)
    assert (sleep.num_blocks, sleep.block_layers, sleep.loop_layers) == (4, (5, 6, 8, 9), (5, 10))
    assert (sleep.block_head_dim, sleep.block_num_heads) == (16, 1)
    assert SleepConfig().resolve(LlamaConfig(num_hidden_layers=2)).num_blocks == 1
    assert sleep.resolve(base) == sleep


@pytest.mark.parametrize("depth", [*range(1, 9), 28, 30])
def test_blocks_are_spread_evenly_over_the_loop_and_then_over_the_rest(depth):
    base = LlamaConfig(num_hidden_layers=depth)
    for count in range(1, depth + 1):
        whole = SleepConfig(num_blocks=count, loop_layers=(0, depth)).resolve(base)
        assert whole.block_layers == tuple(int((i + 0.5) * depth / count) for i in range(count))
        sleep = SleepConfig(num_blocks=count).resolve(base)
        looped = range(*sleep.loop_layers)
        inside = [layer for layer in sleep.block_layers if layer in looped]
        assert (len(inside), len(sleep.block_layers)) == (min(count, len(looped)), count)
        assert max(b - a for a, b in pairwise([*inside, inside[-1]])) <= -(-len(looped) // len(inside))


def test_blocks_that_do_not_fit_into_the_loop_stand_outside_it():
    base = LlamaConfig(num_hidden_layers=12)
    assert SleepConfig(num_blocks=6, loop_layers=(4, 8)).resolve(base).block_layers == (2, 4, 5, 6, 7, 10)


def middle_is_a_range_of_whole_periods(kinds: list[str], loop: tuple[int, int], period: int) -> None:
    """The range holds whole periods, about a third of the layers, as near the middle as a period's start can be."""
    depth, (first, end) = len(kinds), loop
    assert 0 <= first < end <= depth
    assert first % period == (end - first) % period == 0
    assert abs(end - first - depth / 3) <= max(period / 2, period - depth / 3)
    assert 0 <= (depth - end) - first <= 2 * period


@pytest.mark.parametrize("depth", [*range(1, 9), 28, 30, 48])
def test_the_middle_third_loops(depth):
    loop = SleepConfig().resolve(LlamaConfig(num_hidden_layers=depth)).loop_layers
    middle_is_a_range_of_whole_periods(["full_attention"] * depth, loop, 1)
    assert loop == {1: (0, 1), 2: (0, 1), 3: (1, 2), 4: (1, 2), 28: (9, 18), 30: (10, 20), 48: (16, 32)}.get(
        depth, loop
    )


PATTERNS = {
    "three linear, one full": (["linear_attention"] * 3 + ["full_attention"], 4),
    "two": (["linear_attention", "full_attention"], 2),
    "five sliding, one full": (["sliding_attention"] * 5 + ["full_attention"], 6),
    "full in the middle": (["linear_attention", "full_attention", "linear_attention"], 3),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("depth", [*range(1, 9), 12, 28, 30, 48])
def test_a_mixed_base_loops_whole_periods(pattern, depth):
    unit, period = PATTERNS[pattern]
    kinds = (unit * depth)[:depth]
    found = period_of(kinds)
    assert found == period if depth >= 2 * period else found < period
    middle_is_a_range_of_whole_periods(kinds, middle_third(kinds), found)


def test_layers_left_over_after_the_last_period_may_differ():
    """Kimi Linear's 27 layers end in two linear ones and a full one."""
    kinds = PATTERNS["three linear, one full"][0] * 6 + ["linear_attention", "linear_attention", "full_attention"]
    assert (period_of(kinds), middle_third(kinds)) == (4, (8, 16))


def test_where_nothing_repeats_any_range_will_do():
    kinds = ["linear_attention"] * 9 + ["full_attention"] + ["linear_attention"] * 2
    assert (period_of(kinds), middle_third(kinds)) == (1, (4, 8))


@pytest.mark.parametrize("family", FAMILIES | MORE_FAMILIES | RELATIVES)
def test_every_family_loops_a_middle_range_but_the_two_of_the_paper(family):
    config = make_config(family)
    kinds, loop = adapter_of(config).layer_kinds(config), SleepConfig().resolve(config).loop_layers
    if family in ("ouro", "jet_nemotron"):
        assert loop == {"ouro": (0, 4), "jet_nemotron": (1, 3)}[family]
    else:
        middle_is_a_range_of_whole_periods(kinds, loop, 2 if len(set(kinds)) == 2 else 1)


@pytest.mark.parametrize("depth", [*range(1, 9), 28, 30])
def test_ouro_loops_all_layers_and_jet_nemotron_its_middle_half(depth):
    assert SleepConfig().resolve(OuroConfig(num_hidden_layers=depth)).loop_layers == (0, depth)
    jet = JetNemotronConfig(num_hidden_layers=depth, layer_types=["attn"] * depth)
    assert SleepConfig().resolve(jet).loop_layers == (depth // 4, depth - depth // 4)


def test_a_config_may_say_which_layers_loop():
    base = LlamaConfig(num_hidden_layers=9, default_loop_layers=(2, 5))
    assert SleepConfig().resolve(base).loop_layers == (2, 5)
    assert SleepConfig(loop_layers=(0, 9)).resolve(base).loop_layers == (0, 9)


def test_a_checkpoint_keeps_its_loop_where_none_is_asked_for():
    base = make_base("llama").config
    saved = SleepConfig(loop_layers=(0, 4)).resolve(base)
    assert saved.changed(SleepConfig(sleep_passes=3)).resolve(base).loop_layers == (0, 4)
    assert saved.changed({"sleep_passes": 3}).resolve(base).loop_layers == (0, 4)
    assert saved.changed(SleepConfig(loop_layers=(1, 3))).resolve(base).loop_layers == (1, 3)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in HYBRIDS])
def test_an_attention_only_base_gets_blocks(family):
    assert SleepConfig().resolve(make_config(family)).block_layers == ((2,) if family == "ouro" else (1,))


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_hybrid_gets_blocks_only_where_asked(family):
    assert not SleepForCausalLM.from_base(make_base(family)).fast_weights
    asked = SleepForCausalLM.from_base(make_base(family), SleepConfig(num_blocks=1))
    assert list(asked.fast_weights) == ["2" if family == "jet_nemotron" else "1"]
    assert not SleepConfig(num_blocks=0).resolve(make_config(family)).block_layers


FULL = SleepConfig(
    window_size=64,
    sleep_passes=3,
    eviction="sliding",
    num_sink_tokens=2,
    loop_layers=(1, 3),
    block_kind="gated_delta_net",
    block_layers=[0, 2],
    block_num_heads=2,
    block_head_dim=4,
    block_expand_v=1.5,
    block_conv_size=3,
    block_half_lives=[1, 8],
)


def test_a_config_is_a_value():
    sleep = SleepConfig(loop_layers=[0, 2], block_layers=[1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        sleep.sleep_passes = 3
    assert {sleep: 1}[SleepConfig(loop_layers=(0, 2), block_layers=(1,))] == 1
    assert copy.deepcopy(sleep) == pickle.loads(pickle.dumps(sleep)) == sleep
    assert dataclasses.replace(sleep, sleep_passes=3).sleep_passes == 3
    with pytest.raises(ValueError, match=r"SleepConfig\.sleep_passes=0 cannot work"):
        dataclasses.replace(sleep, sleep_passes=0)


def test_every_field_but_the_version_carries_its_help():
    assert [*SETTINGS, "version"] == [field.name for field in dataclasses.fields(SleepConfig)]
    for name, field in SETTINGS.items():
        assert f"{name}: {field.metadata['help']}" in " ".join(SleepConfig.__doc__.split())


@pytest.mark.parametrize("resolved", [False, True])
@pytest.mark.parametrize("sleep", [SleepConfig(), FULL], ids=["default", "full"])
def test_a_config_survives_json(sleep, resolved):
    sleep = sleep.resolve(make_base("llama").config) if resolved else sleep
    assert SleepConfig.from_dict(json.loads(json.dumps(sleep.to_dict()))) == sleep


def test_a_config_from_before_there_were_half_lives_means_the_kinds_own():
    """Its blocks began so; a dictionary that nobody saved means the default."""
    written = FULL.to_dict()
    assert written.pop("block_half_lives") == [1.0, 8.0]
    old = SleepConfig.from_dict(written)
    assert old == dataclasses.replace(FULL, block_half_lives=None)
    assert SleepConfig.from_dict(old.to_dict()) == old
    assert SleepConfig.from_dict({"window_size": 64}) == SleepConfig(window_size=64)
    # Other settings than the blocks' may be asked of it in either form.
    for asked in ({"sleep_passes": 5}, SleepConfig(window_size=64, sleep_passes=5)):
        assert old.changed(asked).block_half_lives is None
        assert old.changed(asked).sleep_passes == 5


def test_a_config_from_before_there_was_a_choice_has_nothing_between_its_passes():
    written = SleepConfig().resolve(make_config("llama")).to_dict()
    assert written.pop("between") == "gate"
    assert written.pop("decay_once") is False
    old = SleepConfig.from_dict(written).resolve(make_config("llama"))
    assert (old.between, old.decay_once) == ("none", False)
    assert old.changed(SleepConfig(sleep_passes=4)).resolve(make_config("llama")).between == "none"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_lies_between_passes_but_in_the_two_bases_of_the_paper(family):
    config = make_config(family)
    paper = family in ("ouro", "jet_nemotron")
    assert SleepConfig().resolve(config).between == ("none" if paper else "gate")
    assert SleepConfig(between="gate").resolve(config).between == "gate"
    assert SleepConfig(between="none").resolve(config).between == "none"


def test_settings_of_the_blocks_are_compared_by_value():
    """A list, as JSON has it, is the tuple that it stands for."""
    asked = {"block_layers": [0, 2], "block_half_lives": [1.0, 8.0], "sleep_passes": 4}
    assert FULL.changed(asked) == dataclasses.replace(FULL, sleep_passes=4)
    with pytest.raises(ValueError, match=r"block_half_lives=\(1.0, 9.0\) cannot work: the checkpoint's blocks have"):
        FULL.changed({"block_half_lives": [1.0, 9.0]})


@pytest.mark.parametrize("family", ["llama_yarn", "gemma3", "qwen3_next"])
def test_a_model_config_survives_its_file(family, tmp_path):
    config = SleepLMConfig(
        text_config=make_base(family).config, sleep=sleep_config(family, sleep_passes=3), base_model_name_or_path="a/b"
    )
    config.save_pretrained(tmp_path)
    for loaded in (SleepLMConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is SleepLMConfig
        assert loaded.sleep == config.sleep
        assert type(loaded.sleep.block_layers) is tuple
        assert type(loaded.text_config) is type(config.text_config)
        assert loaded.base_model_name_or_path == "a/b"
        ignored = {"transformers_version", "_name_or_path"}
        assert {k: v for k, v in loaded.to_dict().items() if k not in ignored} == {
            k: v for k, v in config.to_dict().items() if k not in ignored
        }


def test_the_vocabulary_is_the_base_s(tmp_path):
    config = SleepLMConfig(text_config=make_base("llama").config, sleep=FULL)
    assert config.vocab_size == config.text_config.vocab_size == 61
    config.text_config.vocab_size = 70
    assert config.vocab_size == 70
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    assert "vocab_size" not in written.keys() | config.to_dict().keys()
    assert copy.deepcopy(config).vocab_size == pickle.loads(pickle.dumps(config)).vocab_size == 70
    for read in (SleepLMConfig.from_pretrained, AutoConfig.from_pretrained):
        assert read(tmp_path).vocab_size == 70
        assert read(tmp_path, text_config={"vocab_size": 80}).vocab_size == 80
        with pytest.raises(TypeError, match=r"pass text_config=\{'vocab_size': 80\}"):
            read(tmp_path, vocab_size=80)
    # A file in which somebody else noted it.
    file.write_text(json.dumps(written | {"vocab_size": 70}), encoding="utf-8")
    assert SleepLMConfig.from_pretrained(tmp_path).vocab_size == 70
    with pytest.raises(ValueError, match=r"vocab_size=71, but text_config.vocab_size=70: set the latter alone"):
        SleepLMConfig(**written | {"vocab_size": 71})


def test_fields_of_a_newer_version_are_named_and_ignored(tmp_path):
    newer = FULL.to_dict() | {"dream_depth": 3, "version": "9.9"}
    with pytest.warns(UserWarning, match=rf"\['dream_depth'\] \(written by hf_sleep 9.9, this is {__version__}\)"):
        assert SleepConfig.from_dict(newer).to_dict() == FULL.to_dict()

    SleepLMConfig(text_config=make_base("llama").config, sleep=FULL).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    written["sleep"]["dream_depth"] = 3
    file.write_text(json.dumps(written), encoding="utf-8")
    with pytest.warns(UserWarning, match="dream_depth"):
        assert AutoConfig.from_pretrained(tmp_path).sleep.window_size == FULL.window_size


OUTSIDE = """
import torch
from hf_sleep.engine import Between, Eviction
from hf_sleep.registry import register_between, register_block, register_eviction

@register_eviction("recent")
class Recent(Eviction):
    recent = 2

@register_block("kept")
class Kept(torch.nn.Module):
    pass

@register_between("halve")
class Halve(Between):
    def forward(self, z, e):
        return z / 2
"""
LOAD = """
import sys
from transformers import AutoConfig
import hf_sleep
if len(sys.argv) > 2:
    __import__(sys.argv[2])
try:
    sleep = AutoConfig.from_pretrained(sys.argv[1]).sleep
    print(sleep.eviction, sleep.between, sleep.block_kind, sleep.make_eviction().recent)
except ValueError as error:
    print(error)
"""


def test_a_name_from_outside_survives_its_file_and_says_what_to_import(tmp_path):
    """Each in a process of its own, since what is registered here would be known to all later tests."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "sleeps.py").write_text(OUTSIDE, encoding="utf-8")
    save = "import sys, json, my_package.sleeps\nfrom hf_sleep import SleepLMConfig\n"
    save += "SleepLMConfig(sleep=json.loads(sys.argv[2])).save_pretrained(sys.argv[1])\n"

    def run(code: str, *arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))}
        command = [sys.executable, "-c", code, str(tmp_path / "saved"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    run(save, '{"eviction": "recent", "between": "halve", "block_kind": "kept"}')
    written = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))["sleep"]
    assert written["imports"] == dict.fromkeys(("eviction", "between", "block_kind"), "my_package.sleeps")
    assert run(LOAD, "my_package.sleeps") == "recent halve kept 2"
    assert run(LOAD) == (
        "SleepConfig.eviction='recent' cannot work: it was registered by my_package.sleeps, which has not been "
        "imported here: import my_package.sleeps first"
    )
    assert "imports" not in FULL.to_dict()


def test_a_name_that_a_script_registered_says_so():
    values = FULL.to_dict() | {"eviction": "recent", "imports": {"eviction": "__main__"}}
    with pytest.raises(ValueError, match=r"eviction='recent' cannot work: .* script or notebook that saved it"):
        SleepConfig.from_dict(values)


def test_an_impossible_value_in_a_file_is_refused_as_in_code(tmp_path):
    SleepLMConfig(text_config=make_base("llama").config, sleep=FULL).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"window_size": 64', '"window_size": 1'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"SleepConfig\.window_size=1 cannot work"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_type", [None, "nonesuch"])
def test_an_unknown_base_config_is_named(model_type):
    with pytest.raises(ValueError, match=rf"text_config has model_type={model_type!r}"):
        SleepLMConfig(text_config={"model_type": model_type})


def test_plain_transformers_says_that_it_does_not_know_the_type(tmp_path):
    """Rather than load the base without its memory."""
    SleepLMConfig(text_config=make_base("llama").config, sleep=FULL).save_pretrained(tmp_path)
    code = (
        "import sys\nfrom transformers import AutoConfig\n"
        "try:\n    AutoConfig.from_pretrained(sys.argv[1])\n"
        "except ValueError as error:\n    print(error)\n"
        "assert 'hf_sleep' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert "sleep_lm" in run.stdout
    assert "does not recognize" in run.stdout
