"""The dtype follows the machine: who has bfloat16, what is loaded without one, and the warning of a slow one."""

import os
import platform
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from families import make_base, sleep_config, tokens
from torch import bfloat16, float16, float32
from transformers import AutoConfig, BitsAndBytesConfig

from hf_sleep import AutoModelForSleepLM, SleepForCausalLM, auto, default_dtype, dtypes
from hf_sleep.modeling import advice as modeling

L = 6
IDS = tokens(2 * L)[None]


@pytest.fixture
def cpu(monkeypatch):
    """Makes this CPU one with the given instructions and the given word of oneDNN; there is no accelerator."""

    def be(*instructions, bf16=True, fp16=False, onednn=True):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bf16)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: fp16)

    return be


@pytest.fixture
def said(caplog):
    """Collect what the package warns of, with its once-only memory cleared."""
    modeling.logger.warning_once.cache_clear()
    yield lambda: [record.message for record in caplog.records if "for which this CPU has no instr" in record.message]
    modeling.logger.warning_once.cache_clear()


# The machine.

AVX2, AVX512 = ("avx2",), ("avx2", "avx512_f", "avx512_bw")
CPUS = {
    "AVX2": (AVX2, {"bf16": False}, float32),
    "AVX-512, in which oneDNN converts": (AVX512, {}, float32),
    "AVX-512 with bfloat16": ((*AVX512, "avx512_bf16"), {}, bfloat16),
    "AVX-512 with bfloat16, which oneDNN was told to leave": ((*AVX512, "avx512_bf16"), {"bf16": False}, float32),
    "AMX": ((*AVX512, "amx_bf16"), {}, bfloat16),
    "Arm": (("neon",), {"bf16": False}, float32),
    "Arm with bfloat16": (("neon", "bf16"), {}, bfloat16),
    "Apple's, where torch has no oneDNN": (("neon", "bf16"), {"onednn": False}, float32),
}


@pytest.mark.parametrize("case", CPUS)
def test_a_cpu_computes_in_bfloat16_where_it_has_it(case, cpu):
    instructions, says, expected = CPUS[case]
    cpu(*instructions, **says)
    assert default_dtype() == default_dtype("cpu") == default_dtype(torch.device("cpu")) == expected


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_computes_in_bfloat16_where_it_has_it_natively(native, cpu, monkeypatch):
    cpu(*AVX2, bf16=False)
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(asked.append(device)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native)
    assert default_dtype("cuda:1") == (bfloat16 if native else float32)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    assert default_dtype() == (bfloat16 if native else float32)
    assert default_dtype("cpu") == float32
    assert asked == [torch.device("cuda:1"), torch.device("cuda")]


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_a_device_that_nothing_was_run_on_gets_what_all_have(device, cpu):
    cpu("avx512_bf16")
    assert default_dtype(device) == float32


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the variables are for x86")
def test_without_avx512_this_machine_computes_in_float32():
    """torch and oneDNN themselves, told to make do with AVX2."""
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    # The file alone, as transformers takes long to import.
    code = f"import runpy, torch; print(runpy.run_path({dtypes.__file__!r})['default_dtype']('cpu'), end=' ');"
    code += "print(torch.backends.cpu.get_cpu_capability())"
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, env=os.environ | limits, capture_output=True, encoding="utf-8", check=True)
    assert ran.stdout.split() == ["torch.float32", "AVX2"]


# Computing.


@pytest.mark.parametrize("dtype", [bfloat16, float16], ids=str)
def test_a_model_says_once_that_its_dtype_is_slow_here(dtype, cpu, said):
    cpu(*AVX2, bf16=False)
    model = SleepForCausalLM.from_base(make_base("llama", dtype), sleep_config("llama", window_size=2 * L))
    for _ in range(2):
        model(IDS)
    model.generate(IDS, max_new_tokens=1, pad_token_id=0)
    assert len(said()) == 1
    assert str(dtype).removeprefix("torch.") in said()[0]
    assert "call model.float()" in said()[0]
    modeling.logger.warning_once.cache_clear()
    model.float()(IDS)
    assert len(said()) == 1


def test_autocast_is_told_to_be_left_out(cpu, said):
    cpu(*AVX2, bf16=False)
    model = SleepForCausalLM.from_base(make_base("llama"), sleep_config("llama", window_size=2 * L))
    with torch.autocast("cpu", bfloat16):
        model(IDS)
    assert len(said()) == 1
    assert "bf16=False" in said()[0]


@pytest.mark.parametrize(("dtype", "slow"), [(bfloat16, False), (float16, True), (float32, False)], ids=str)
def test_a_cpu_with_bfloat16_alone_is_slow_in_float16_alone(dtype, slow, cpu, said):
    cpu("avx512_bf16")
    SleepForCausalLM.from_base(make_base("llama", dtype), sleep_config("llama", window_size=2 * L))(IDS)
    assert len(said()) == slow


# Loading.


@pytest.fixture
def saved(tmp_path):
    """A checkpoint in bfloat16: a base, or a model that sleeps, whole or its blocks alone."""

    def make(kind, dtype=bfloat16):
        base = make_base("llama", dtype)
        base.save_pretrained(tmp_path / "base")
        if kind == "base":
            return tmp_path / "base"
        base = AutoModelForSleepLM.from_pretrained(tmp_path / "base", sleep=sleep_config("llama"), dtype=dtype)
        base.save_pretrained(tmp_path / kind, only_sleep=kind == "only_sleep")
        return tmp_path / kind

    return make


@pytest.mark.parametrize("kind", ["base", "whole", "only_sleep"])
def test_a_checkpoint_that_would_be_slow_is_loaded_in_float32_with_its_values(kind, saved, cpu, said):
    folder = saved(kind)
    cpu(*AVX2, bf16=False)
    settings = {"sleep": sleep_config("llama")} if kind == "base" else {}
    kept = AutoModelForSleepLM.from_pretrained(folder, dtype="auto", **settings)
    assert (kept.dtype, said()) == (bfloat16, [])
    for device_map in (None, "cpu", "auto"):
        model = AutoModelForSleepLM.from_pretrained(folder, device_map=device_map, **settings)
        assert (model.dtype, model.config.dtype) == (float32, float32)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == float32
            if kind != "base" or name.startswith("lm."):  # a base gets fresh blocks
                assert torch.equal(parameter, kept.get_parameter(name).float()), name
    assert len(said()) == 1
    assert 'dtype="bfloat16"' in said()[0]
    assert model(IDS).logits.dtype == float32


@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["base", "whole", "only_sleep"])
def test_where_nothing_is_slow_a_checkpoint_is_loaded_as_it_is(kind, dtype, saved, cpu, said):
    folder = saved(kind, dtype)
    cpu("avx512_bf16")
    assert AutoModelForSleepLM.from_pretrained(folder).dtype == dtype
    assert not said()


def test_what_goes_to_an_accelerator_is_loaded_as_it_is(saved, cpu, said, monkeypatch):
    folder = saved("whole")
    cpu(*AVX2, bf16=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    assert AutoModelForSleepLM.from_pretrained(folder).dtype == bfloat16
    assert AutoModelForSleepLM.from_pretrained(folder, device_map="cpu").dtype == float32


def test_a_quantised_base_keeps_its_own_idea_of_a_dtype(saved, cpu):
    folder = saved("base")
    cpu(*AVX2, bf16=False)
    config = AutoConfig.from_pretrained(folder)
    assert auto._native_dtype(config, {}) == {"dtype": float32}
    assert auto._native_dtype(config, {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}) == {}
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert auto._native_dtype(config, {}) == {}


def test_a_checkpoint_that_names_no_dtype_is_loaded_as_it_is(saved, cpu):
    folder = saved("base")
    cpu(*AVX2, bf16=False)
    config = AutoConfig.from_pretrained(folder)
    config.dtype = None
    assert dtypes.dtype_to_load(config, None) is None
