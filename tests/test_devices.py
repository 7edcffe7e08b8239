"""Work that another device cannot do is done on the CPU: Apple's GPUs have no float64."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from families import FAMILIES, make_base, make_model, sleep_config, tokens
from helpers import L, pad, sleeper, word_tokenizer, words
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer

from hf_sleep import SessionBatch, SleepCache, SleepSession
from hf_sleep.bases.decoder import decoder_for
from hf_sleep.engine import PassEvent
from hf_sleep.state import fingerprint
from hf_sleep.training import SleepMonitor


class Elsewhere(torch.Tensor):
    """A tensor on a device without float64; what is computed with it is there too, until `cpu()` brings it back."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.Tensor.cpu:
            return out.as_subclass(torch.Tensor)
        if any(isinstance(leaf, cls) and leaf.dtype == torch.float64 for leaf in tree_leaves(out)):
            raise TypeError("this device has no float64")
        return out


def elsewhere(t: torch.Tensor) -> torch.Tensor:
    return t.as_subclass(Elsewhere)


def test_the_device_has_no_float64():
    t = elsewhere(torch.ones(3))
    assert isinstance(t + torch.ones(3), Elsewhere)
    assert type(t.cpu().double()) is torch.Tensor
    for make in (lambda: t.double(), lambda: t.to(torch.float64).cpu(), lambda: torch.mul(t, torch.ones(3).double())):
        with pytest.raises(TypeError, match="no float64"):
            make()


class LikeAGPU(TorchFunctionMode):
    """Where autocast promotes on a CPU alone, refuse two dtypes, as a GPU does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.index_copy and args[0].dtype != args[3].dtype:
            raise RuntimeError("index_copy_(): self and source expected to have the same dtype")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("eviction", ["hard", "sliding+sink"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_some_rows_sleep_under_autocast_without_its_promotion(family, eviction):
    model, rows = sleeper(f"{family}/{eviction}/N2/all", torch.float32), [tokens(3), tokens(L + 3, 2), tokens(2 * L, 3)]
    ids, mask = pad(rows, "right")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(ids, attention_mask=mask).logits
        with LikeAGPU():
            assert torch.equal(model(ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_keys_are_turned_without_float64_on_their_device(family, monkeypatch):
    decoder = decoder_for(make_base(family))
    keys, shift = torch.randn(2, 2, 5, 8), torch.tensor([-3, -400])
    kinds = {kind for kind in decoder.kinds if kind.endswith("attention") and kind != "linear_attention"}
    expected = {kind: decoder.shift_keys(keys, shift, kind) for kind in kinds or decoder.kinds}
    frequencies = decoder.frequencies
    monkeypatch.setattr(
        decoder, "frequencies", lambda kind: None if frequencies(kind) is None else elsewhere(frequencies(kind))
    )
    for kind, turned in expected.items():
        again = decoder.shift_keys(elsewhere(keys), shift, kind)
        assert isinstance(again, Elsewhere)
        assert torch.equal(again.cpu(), turned)


def test_the_monitor_measures_without_float64_on_the_models_device():
    model = make_model("llama", sleep_config("llama"))
    ids = tokens(20)[None]
    monitor = SleepMonitor(mock.Mock(spec=Trainer))
    monitor._keep_batch(model.train(), (), {"input_ids": ids, "labels": ids})
    expected = monitor.measure(model)
    read = monitor._read

    def read_elsewhere(model):
        metrics, cache = read(model)
        moved = SleepCache()
        moved._owner = cache._owner
        moved.memory = cache.memory.map(elsewhere)
        return metrics, moved

    monitor._read = read_elsewhere
    measured = monitor.measure(model)
    for name in ("fast_weight_norm", "fast_weight_rank"):
        assert measured[name] == expected[name]


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 0.0])
def test_gradient_norms_are_measured_without_float64_on_the_models_device(scale):
    """Gradients may have squares that float32 does not hold."""
    logged, hooks = {}, []
    monitor = SleepMonitor(mock.Mock(spec=Trainer), every=1)
    monitor.trainer.log = logged.update
    monitor.measure = lambda model: {}
    monitor.trainer.accelerator = SimpleNamespace(autocast=torch.no_grad)
    written = [SimpleNamespace(requires_grad=True, register_hook=hooks.append)]
    monitor._watch(PassEvent(1, written, torch.zeros(2, 1, 4), None, [1, 1]))
    gradients = [scale * torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    for gradient in gradients:
        hooks[0](elsewhere(gradient))
    monitor.on_log(None, None, None, None, {"loss": 1.0})
    assert logged["gradient_norm_pass_1"] == pytest.approx(torch.stack(gradients).double().norm().item(), rel=1e-6)


OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model, CPU),
    "cpu, buffers too": lambda model, folder: cpu_offload(model, CPU, offload_buffers=True),
    "disk": lambda model, folder: disk_offload(model, folder, CPU),
}
CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "gemma3", "jet_nemotron", "kimi_linear", "granitemoehybrid"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_weights_that_come_when_their_module_is_called_are_waited_for(offload, family, tmp_path):
    """accelerate hooks the modules that hold weights, and no layer around them."""
    model, ids = sleeper(f"{family}/sliding+sink/N2/all", torch.float32).eval(), tokens(2 * L + 3)[None]
    with torch.no_grad():
        expected, digest = model(ids).logits, fingerprint(model)
        OFFLOADS[offload](model, tmp_path)
        assert next(model.parameters()).is_meta
        assert torch.equal(model(ids).logits, expected)
    assert model.device == CPU
    assert model.slot_devices() == [CPU] * len(model.slot_devices())
    assert fingerprint(model) == digest


def test_a_session_and_a_batch_of_sessions_have_a_model_whose_weights_are_kept_elsewhere():
    plain, kept = (sleeper("llama/hard/N2/all", torch.float32).eval() for _ in range(2))
    cpu_offload(kept, CPU)
    how = {"do_sample": False, "max_new_tokens": 4, "suppress_tokens": list(range(5))}
    answers = []
    for model in (plain, kept):
        s, batch = SleepSession(model, word_tokenizer()), SessionBatch(model)
        s.read(words(2 * L), progress=False)
        submitted = batch.submit(s, words(2), seed=1, **how | {"do_sample": True})
        batch.run()
        answers.append([s.ask(words(2), **how), submitted.result(0)])
        again = s.to_state().to_cache(model).memory
        assert again.counters == s._held.memory.counters
    assert answers[0] == answers[1]


def test_a_default_device_does_not_move_what_is_computed_on_the_cpu():
    base = make_base("llama")
    expected = fingerprint(base)
    with torch.device("meta"):
        assert fingerprint(base) == expected
