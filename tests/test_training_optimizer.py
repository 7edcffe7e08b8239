"""MuonAdamW: who trains what, and that it is torch's Muon and AdamW, step by step and across a save."""

import copy
import io
import re

import pytest
import torch
from families import FAMILIES, make_model, sleep_config, tokens
from peft import get_peft_model
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR

from hf_sleep import sleep_lora_config
from hf_sleep.training import MuonAdamW, freeze_all_but_fast_weights, parameter_groups

HIDDEN = re.compile(
    r"\.(q_proj|k_proj|v_proj|o_proj|out_proj|g_proj|a_proj|b_proj|in_proj(_\w+)?|gate_proj|up_proj|down_proj|qkv_proj|gate_up_proj|w1|w2"
    r"|input_linear|output_linear|kv_a_proj_with_mqa|kv_b_proj|[fg]_[ab]_proj)\.weight$"
)


def tiny(family="llama", **fields):
    return make_model(family, sleep_config(family, **fields))


def gradients(model, seed):
    model.zero_grad()
    model.train()(tokens(13, seed)[None], labels=tokens(13, seed)[None]).loss.backward()


def optimizer_of(model, **settings):
    return MuonAdamW(parameter_groups(model), **settings)


def save_and_load(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# Groups.


@pytest.mark.parametrize("kind", ["jet", "gated_delta_net"])
@pytest.mark.parametrize("family", FAMILIES)
def test_muon_takes_the_hidden_matrices_and_nothing_else(family, kind):
    model = tiny(family, block_kind=kind)
    groups = parameter_groups(model)
    muon = {name for name, _ in groups["muon"]}
    everything = dict(model.named_parameters())
    assert muon == {name for name in everything if HIDDEN.search(name)}
    assert len(muon) > 20
    assert all(everything[name].ndim == 2 for name in muon)
    # Every parameter once, and no decay exactly where there is one dimension.
    together = [name for named in groups.values() for name, _ in named]
    assert sorted(together) == sorted(everything)
    assert {name for name, _ in groups["adamw_no_decay"]} == {n for n, p in everything.items() if p.ndim < 2}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_embeddings_and_head_are_adamw_s_tied_or_not(family):
    model = tiny(family)
    tied = model.lm.lm_head.weight is model.lm.model.embed_tokens.weight
    assert tied is (family == "qwen3")
    adamw = [name for name, _ in parameter_groups(model)["adamw"]]
    assert adamw == ["lm.model.embed_tokens.weight", *([] if tied else ["lm.lm_head.weight"])]


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("how", ["modules_to_save", "target_modules"])
def test_embeddings_and_head_are_adamw_s_where_an_adapter_trains_them(how, module):
    model = tiny()
    projections = {"target_modules": ["q_proj", module]} if how == "target_modules" else {how: [module]}
    groups = parameter_groups(get_peft_model(model, sleep_lora_config(model, r=2, **projections)))
    trained = {kind: [name for name, _ in named if module in name] for kind, named in groups.items()}
    assert len(trained["adamw"]) == (2 if how == "target_modules" else 1)
    assert not trained["muon"]
    assert any("q_proj.lora_A" in name for name, _ in groups["muon"])


def test_two_dimensional_taps_routers_and_experts_are_adamw_s():
    names = {name for name, _ in parameter_groups(tiny("qwen3_next", block_kind="gated_delta_net"))["adamw"]}
    assert "fast_weights.1.mixer.conv_weight" in names
    assert {"lm.model.layers.0.mlp.gate.weight", "lm.model.layers.0.mlp.shared_expert_gate.weight"} <= names
    assert "lm.model.layers.0.mlp.experts.down_proj" in names


def test_frozen_parameters_are_left_out():
    model = tiny()
    model.lm.requires_grad_(False)
    names = [name for named in parameter_groups(model).values() for name, _ in named]
    assert names
    assert all(name.startswith("fast_weights.") for name in names)


@pytest.mark.parametrize("muon", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
def test_what_lies_between_passes_is_a_group_of_its_own(adapted, muon):
    model = tiny(between="gate")
    model.between.mix = torch.nn.Linear(4, 4)  # no matrix of Muon's, and not decayed
    others = sum(p.requires_grad for name, p in model.named_parameters() if not name.startswith("between."))
    wrapped = get_peft_model(model, sleep_lora_config(model)) if adapted else model
    groups = parameter_groups(wrapped, muon)
    assert [
        name.rpartition("between.")[2].removeprefix("modules_to_save.default.") for name, _ in groups["between"]
    ] == [
        "gate",
        "mix.weight",
        "mix.bias",
    ]
    assert all(p.requires_grad for _, p in groups["between"])
    assert not any("between" in name for kind in groups if kind != "between" for name, _ in groups[kind])
    if not adapted:
        assert sum(map(len, groups.values())) == others + 3
        freeze_all_but_fast_weights(model)
        assert len(parameter_groups(model, muon)["between"]) == 3
        model.between.requires_grad_(False)
        assert parameter_groups(model, muon)["between"] == []


def test_without_muon_its_matrices_are_adamw_s():
    model = tiny()
    groups = parameter_groups(model, muon=False)
    assert groups["muon"] == []
    moved = {name for name, _ in parameter_groups(model)["muon"]}
    assert moved < {name for name, _ in groups["adamw"]}


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="every parameter is frozen"):
        MuonAdamW(parameter_groups(tiny().requires_grad_(False)))


# Steps.


@pytest.mark.parametrize("fused", [False, True])
def test_it_is_torch_s_muon_and_adamw_under_one_scheduler(fused):
    ours, theirs = tiny(), tiny()
    settings = {"lr": 3e-3, "betas": (0.8, 0.9), "eps": 1e-7, "weight_decay": 0.2}
    optimizer = optimizer_of(ours, muon_lr=2e-2, fused=fused, **settings)
    groups = {kind: [p for _, p in named] for kind, named in parameter_groups(theirs).items()}
    parts = [
        Muon(groups["muon"], lr=2e-2, weight_decay=0.2),
        AdamW(groups["adamw"], fused=fused, **settings),
        AdamW(groups["adamw_no_decay"], fused=fused, **settings | {"weight_decay": 0.0}),
    ]
    schedulers = [LambdaLR(o, lambda step: 1 / (step + 1)) for o in (optimizer, *parts)]
    for step in range(3):
        for model, steppers in ((ours, [optimizer]), (theirs, parts)):
            gradients(model, seed=step)
            for stepper in steppers:
                stepper.step()
        for scheduler in schedulers:
            scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [3e-3 / 4, 3e-3 / 4, 2e-2 / 4]
    before = dict(tiny().named_parameters())
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, before[name]), name


@pytest.mark.parametrize("fused", [False, True])
def test_the_gate_has_its_rate_and_no_decay(fused):
    moved = {}
    for rate, decay in ((1e-2, 0.0), (1e-2, 0.5), (3e-2, 0.0)):
        model = tiny(between="gate", sleep_passes=2)
        model.between.gate.data.zero_()
        optimizer = optimizer_of(model, gate_lr=rate, weight_decay=decay, lr=1e-9, muon_lr=1e-9, fused=fused)
        assert {group["kind"]: group["lr"] for group in optimizer.param_groups}["between"] == rate
        gate = [model.between.gate.clone()]
        for _ in range(2):
            gradients(model, seed=0)
            optimizer.step()
            gate.append(model.between.gate.clone())
        moved[rate, decay] = gate
        # Adam's step is as large as its rate: some hundred of them open the gate.
        torch.testing.assert_close(gate[1].abs(), torch.full_like(gate[1], rate), rtol=1e-3, atol=0)
    for plain, decayed in zip(moved[1e-2, 0.0], moved[1e-2, 0.5], strict=True):
        torch.testing.assert_close(plain, decayed, rtol=1e-3, atol=1e-7)


def test_a_state_goes_on_to_the_last_digit():
    model = tiny(between="gate")
    optimizer = optimizer_of(model)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    for seed in range(3):
        gradients(model, seed)
        optimizer.step()
        scheduler.step()
    twin = copy.deepcopy(model)
    again = optimizer_of(twin, lr=1.0, muon_lr=1.0)
    resumed = LambdaLR(again, lambda step: 0.5**step)
    again.load_state_dict(save_and_load(optimizer.state_dict()))
    resumed.load_state_dict(save_and_load(scheduler.state_dict()))
    for seed in range(3, 6):
        for m, o, s in ((model, optimizer, scheduler), (twin, again, resumed)):
            gradients(m, seed)
            o.step()
            s.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_closure_is_called_once_and_gradients_are_cleared():
    model, calls = tiny(), []
    optimizer = optimizer_of(model)

    def closure():
        calls.append(torch.is_grad_enabled())
        gradients(model, seed=0)
        return "the loss"

    assert optimizer.step(closure) == "the loss"
    assert calls == [True]
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


# Another model's state.


@pytest.mark.parametrize(
    ("other", "message"),
    [
        pytest.param(
            lambda: optimizer_of(tiny(block_head_dim=4)), r"o_norm.weight \[8\].*o_norm.weight \[16\]", id="shape"
        ),
        pytest.param(lambda: optimizer_of(tiny(block_layers=(0, 1))), r"fast_weights.1.norm", id="name"),
        pytest.param(
            lambda: MuonAdamW(parameter_groups(tiny(), muon=False)), "another choice of what to train", id="optimizer"
        ),
        pytest.param(lambda: optimizer_of(tiny(block_layers=(0,))), "another model", id="fewer"),
        pytest.param(lambda: optimizer_of(tiny(between="gate")), r"between.gate \[\d+\] \(between\)", id="gate"),
        pytest.param(lambda: AdamW(tiny().parameters()), "not written by MuonAdamW", id="plain"),
    ],
)
def test_another_model_s_state_is_refused_and_changes_nothing(other, message):
    model = tiny(between="none")
    optimizer = optimizer_of(model)
    gradients(model, seed=0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(other().state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    for index, state in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in state.items())
