"""Two gloo processes on the CPU train what one process trains: DDP and FSDP2, ragged ranks, resuming, refusals."""

import json
import os
import signal
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from distributed_run import DDP, FSDP, run
from families import make_model, sleep_config, tokens
from safetensors.torch import load_file
from transformers import Trainer

from hf_sleep import SleepForCausalLM
from hf_sleep.compat import CHECKPOINTING
from hf_sleep.training import SleepTrainer, SleepTrainingArguments

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "recipes" / "accelerate"
# In float64 two processes differ by the order of sums alone. Trainer adds up its logged loss in float32.
LOSS = 2e-6
EXACT = 1e-9
# These bases compute norms and gates in float32, whatever the weights are, and Adam divides by small gradients.
FLOAT32_PARTS = ("qwen3_5", "qwen3_next")
ROUGH = 1e-4
BF16 = {"loss": 1e-3, "grad_norm": 1e-2}
TIMEOUT = 300
IDS = tokens(20)[None]


def launch(command, folder):
    """Run processes that must not hang; what they wrote."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    output = folder / "output.txt"
    with output.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = "hung"
    if code != 0:
        pytest.fail(f"{command}: {code}\n{output.read_text(encoding='utf-8')[-6000:]}")
    ranks = [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    return SimpleNamespace(folder=folder, ranks=ranks, output=output.read_text(encoding="utf-8"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    config = ["--config_file", str(CONFIGS / "cpu.yaml"), "--main_process_port", free_port()]
    return launch([*accelerate, *config, "tests/distributed_run.py", "ddp", str(folder)], folder)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return launch([*torchrun, "tests/distributed_run.py", "fsdp", str(folder)], folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A case in this process, without interruption, with all rows in one batch."""

    @cache
    def run_once(case):
        fields = {key: value for key, value in dict(case).items() if key not in ("resume", "save_strategy")}
        result, weights, _ = run(tmp_path_factory.mktemp("alone"), **{k: thaw(v) for k, v in fields.items()})
        return result, {name: tensor.clone() for name, tensor in weights.items()}

    return lambda case: run_once(tuple((key, freeze(value)) for key, value in case.items()))


def freeze(value):
    return tuple(value.items()) if isinstance(value, dict) else value


def thaw(value):
    return dict(value) if isinstance(value, tuple) and value and isinstance(value[0], tuple) else value


def assert_same_run(launched, name, case, alone):
    result, weights = alone(case)
    tolerance = ROUGH if case.get("family") in FLOAT32_PARTS else EXACT
    steps = 1 if "resume" in case else len(result["passes"])  # that this run made; its log holds those before
    for ranks in launched.ranks:
        assert ranks[name]["loss"] == pytest.approx(result["loss"], abs=LOSS)
        assert ranks[name]["grad_norm"] == pytest.approx(result["grad_norm"], rel=tolerance)
        assert ranks[name]["passes"] == result["passes"][-steps:]
        assert ranks[name]["skipped"] == result["skipped"]
    theirs = torch.load(launched.folder / f"{name}.pt")
    assert theirs.keys() == weights.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(
            theirs[key], tensor, rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", [name for name in DDP if not DDP[name].get("bf16")])
def test_ddp_trains_what_one_process_trains(name, ddp, alone):
    assert_same_run(ddp, name, DDP[name], alone)


@pytest.mark.parametrize("name", [name for name in FSDP if name != "bf16"])
def test_fsdp_trains_what_one_process_trains(name, fsdp, alone):
    assert_same_run(fsdp, name, FSDP[name], alone)


def test_the_weights_were_sharded_layer_by_layer(fsdp):
    units = fsdp.ranks[0]["units"]
    assert {"LlamaDecoderLayer", "FastWeightBlock", "Qwen3_5DecoderLayer", "OuroDecoderLayer"} <= set(units)


def test_n_is_drawn_alike_on_every_rank(ddp, fsdp):
    for launched in (ddp, fsdp):
        first, second = (ranks["schedule"]["passes"] for ranks in launched.ranks)
        assert first == second
        assert len(set(first)) > 1


def test_all_ranks_skip_a_spike(ddp, fsdp):
    for launched in (ddp, fsdp):
        first, second = (ranks["spikes"]["skipped"] for ranks in launched.ranks)
        assert first == second
        assert 0 < len(first) < DDP["spikes"]["max_steps"]


def test_ranks_with_rows_of_other_lengths_evaluate_alike(fsdp, alone):
    result, _ = alone(FSDP["ragged_loop"])
    for ranks in fsdp.ranks:
        assert ranks["ragged_loop"]["eval_loss"] == pytest.approx(result["eval_loss"], abs=LOSS)


def test_fsdp_in_bf16_begins_as_one_process_does(fsdp, alone):
    result, _ = alone(FSDP["bf16"])
    for key, tolerance in BF16.items():
        assert fsdp.ranks[0]["bf16"][key] == pytest.approx(result[key], rel=tolerance)


def test_what_fsdp_saves_is_what_it_trained(fsdp):
    trained = torch.load(fsdp.folder / "saved.pt")
    model = SleepForCausalLM.from_pretrained(fsdp.folder / "model")
    assert trained.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    checkpoint = load_file(fsdp.folder / "saved" / "checkpoint-2" / "model.safetensors")
    assert not torch.equal(checkpoint["fast_weights.0.norm.weight"], trained["fast_weights.0.norm.weight"])


def test_a_recipe_trains_evaluates_and_saves_sharded(fsdp):
    folder = fsdp.folder / "recipe"
    (result,) = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert result["accuracy"].keys() == {"2"}
    assert fsdp.output.count("| chance |") == 1
    model = SleepForCausalLM.from_pretrained(folder / "N2-seed0")
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_nothing_warns_of_what_fsdp_cannot_watch(fsdp):
    assert "returned a view tensor" not in fsdp.output


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("fingerprint", "sharded over ranks"),
        ("evaluation", "Set eval_on_start=True, or evaluate in one process or under DDP"),
        ("only_sleep", "save with trainer.save_model"),
        ("whole", "save with trainer.save_model"),
        ("casts", "FSDP's mixed precision casts them"),
        ("own_checkpointing", f"set the training argument {CHECKPOINTING}=True"),
    ],
)
def test_fsdp_refuses(what, message, fsdp):
    for ranks in fsdp.ranks:
        assert message in ranks["refusals"][what]


# Configs.


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("cpu", "MULTI_GPU", 2),
        ("one_gpu", "NO", 1),
        ("ddp", "MULTI_GPU", 8),
        ("fsdp2", "FSDP", 8),
        ("zero2", "DEEPSPEED", 8),
    ],
)
def test_accelerate_reads_the_configs(name, kind, processes):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes) == (kind, processes)
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    if name == "zero2":
        assert config.deepspeed_config["zero_stage"] == 2


@pytest.mark.parametrize("call", [lambda model: model(IDS), lambda model: model.generate(IDS, max_new_tokens=2)])
def test_zero_3_is_refused_before_ranks_can_wait_for_each_other(call):
    """DeepSpeed is not in the tests: it marks every parameter that ZeRO-3 has partitioned with a `ds_id`."""
    model = make_model("llama", sleep_config("llama"))
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO-3 .* Use FSDP2"):
        call(model)


def test_muon_is_refused_where_deepspeed_flattens(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", lambda self: None)
    trainer = object.__new__(SleepTrainer)
    trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled = True, False
    trainer.args = SleepTrainingArguments(tmp_path, use_cpu=True)
    with pytest.raises(ValueError, match="Set muon_learning_rate=None, or use FSDP2"):
        trainer.create_accelerator_and_postprocess()
    trainer.args = SleepTrainingArguments(tmp_path, use_cpu=True, muon_learning_rate=None)
    trainer.create_accelerator_and_postprocess()
