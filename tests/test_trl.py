"""TRL's trainers train through sleep: their losses, log-probabilities and gradients are those of our own forward."""

import copy
import math
from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import trl
from datasets import Dataset
from families import FAMILIES, MORE_FAMILIES, VOCAB, make_model, sleep_config, tokens
from helpers import assert_close
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from trl.trainer.utils import add_fused_lm_head

from hf_sleep import AutoModelForSleepLM, SleepCache, sleep_lora_config
from hf_sleep.compat import CHECKPOINTING
from hf_sleep.training import HardEvictionWarmup

# TRL's configs still set the old name of activation_checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")

L = 6
QUIET = {
    "report_to": "none",
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "bf16": False,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "optim": "sgd",  # Adam would make much of the last digit of a small gradient
}
LENGTHS = (20, 5, 17, 9, 13, 30, 8, 3)


@pytest.fixture(scope="module")
def tokenizer():
    """A word for every token."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def text(length, seed):
    return " ".join(f"w{max(2, int(token))}" for token in tokens(length, seed))


def tiny(seed=0, family="llama", **fields):
    return make_model(family, sleep_config(family, **{"window_size": L, "sleep_passes": 3} | fields), seed=seed)


def trainer_of(kind, folder, rows, model, tokenizer, others=None, **fields):
    config = {"SFT": trl.SFTConfig, "DPO": trl.DPOConfig, "GRPO": trl.GRPOConfig}[kind]
    trainer = {"SFT": trl.SFTTrainer, "DPO": trl.DPOTrainer, "GRPO": trl.GRPOTrainer}[kind]
    arguments = config(str(folder), **QUIET | {"max_steps": 2} | fields)
    return trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
        **others or {},
    )


TEXTS = [{"text": text(n, n)} for n in LENGTHS]
PAIRS = [
    {"prompt": text(14, n), "chosen": f" {text(n, n + 50)}", "rejected": f" {text(7, n + 99)}"} for n in LENGTHS[:4]
]
PROMPTS = [{"prompt": text(n, n)} for n in LENGTHS[:4]]


def grpo_of(folder, model, tokenizer, **fields):
    """A GRPO trainer of two answers to each prompt, each of up to two windows."""
    settings = {"num_generations": 2, "max_completion_length": 2 * L}
    return trainer_of("GRPO", folder, PROMPTS, model, tokenizer, {"reward_funcs": reward}, **settings | fields)


def reward(completions, **_):
    return [float(len(completion.split())) + completion.count("w3") for completion in completions]


def count_passes(model):
    """The numbers of the passes of every sleep, as they run."""
    numbers = []
    model.register_pass_hook(lambda event: numbers.append(event.number))
    return numbers


def log_probs(model, ids, mask):
    """`[B, T - 1]`: each row alone and without its pads, by our own forward; 0 at pads."""
    made = torch.zeros(ids.shape[0], ids.shape[1] - 1)
    for row, real in enumerate(mask.bool()):
        alone = ids[row][real][None]
        p = model(alone).logits[:, :-1].log_softmax(-1).gather(-1, alone[:, 1:, None])[..., 0]
        columns = real.nonzero().flatten()[1:] - 1
        made = made.index_put((torch.full_like(columns, row), columns), p[0])
    return made


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(one, other, tolerance=1e-4):
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert_close(gradient, other[name], tolerance, name)


# What they build on.


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_model_is_the_sleeping_model_without_its_head(family):
    model = tiny(family=family)
    ids = torch.stack([tokens(3 * L + 2, seed=i) for i in (1, 2)])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    passes = count_passes(model)
    output = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert passes.count(3)
    assert not hasattr(output, "logits")
    logits = model.get_output_embeddings()(output.last_hidden_state) / getattr(model.lm.config, "logits_scaling", 1.0)
    expected = model(ids, attention_mask=mask).logits
    real = mask.bool()
    assert torch.equal(logits[real], expected[real])
    assert not output.last_hidden_state[~real].any()
    last = model.base_model(ids, attention_mask=mask, logits_to_keep=4).last_hidden_state
    assert_close(last, output.last_hidden_state[:, -4:], 1e-5)


@pytest.mark.parametrize("family", FAMILIES | MORE_FAMILIES)
def test_the_base_model_ends_where_the_base_s_does(family):
    """What scales and caps the logits comes after the head, which is left to whoever asks for no head."""
    ids = tokens(L)[None]
    with torch.no_grad():
        model = make_model(family, sleep_config(family, window_size=L), trained=False)
        expected = model.lm.model(ids).last_hidden_state
        assert_close(model.base_model(ids).last_hidden_state, expected, 1e-5)


@pytest.mark.parametrize(
    "family", ["llama", "granite", "granitemoe", "granitemoehybrid", "cohere", "cohere2", "gemma2"]
)
def test_the_fused_head_makes_the_loss_of_the_head(family):
    """The families that scale or cap their logits, with a head of TRL's."""
    model = tiny(family=family)
    ids = torch.stack([tokens(3 * L + 2, seed=i) for i in (1, 2)])
    expected = model(ids, labels=ids).loss
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    add_fused_lm_head(model)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
    assert_close(output.loss, expected, 1e-5)
    output.loss.backward()
    assert_same_gradients(gradients(model), wanted)


def test_the_base_model_carries_a_cache_and_takes_no_labels():
    model, ids = tiny(), tokens(3 * L)[None]
    cache = SleepCache()
    parts = [model.base_model(part, cache=cache) for part in (ids[:, : L + 2], ids[:, L + 2 :])]
    assert parts[1].cache is cache
    assert_close(
        torch.cat([part.last_hidden_state for part in parts], 1), model.base_model(ids).last_hidden_state, 1e-5
    )
    with pytest.raises(ValueError, match="skip_head=True with labels"):
        model.base_model(ids, labels=ids)


# SFT.


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("checkpointing", [True, False])  # TRL's default is True
def test_sft_is_the_plain_trainer(adapter, checkpointing, tokenizer, tmp_path):
    def make():
        model = tiny()
        return model, {"peft_config": sleep_lora_config(model, r=2, init_lora_weights=False)} if adapter else {}

    model, others = make()
    passes = count_passes(model)
    torch.manual_seed(3)
    fields = {CHECKPOINTING: checkpointing, "gradient_accumulation_steps": 2, "max_steps": 3}
    sft = trainer_of("SFT", tmp_path, TEXTS, model, tokenizer, others, **fields, per_device_train_batch_size=2)
    start = copy.deepcopy(sft.model.state_dict())
    sft.train()
    assert passes.count(3)
    assert model.gradient_checkpointing is checkpointing

    model, others = make()
    torch.manual_seed(3)
    twin = trainer_of("SFT", tmp_path, TEXTS, model, tokenizer, others, **fields, per_device_train_batch_size=2).model
    del model.forward  # TRL's, which makes the head its own
    twin.load_state_dict(start)
    arguments = {**QUIET, **fields, "per_device_train_batch_size": 2}
    plain = Trainer(twin, TrainingArguments(tmp_path, **arguments), sft.data_collator, sft.train_dataset)
    plain.train()

    for key in ("loss", "grad_norm"):
        made, expected = (
            [entry[key] for entry in trainer.state.log_history if key in entry] for trainer in (sft, plain)
        )
        assert made == pytest.approx(expected, rel=1e-4)
        assert len(made) == 3
    for name, tensor in sft.model.state_dict().items():
        if not torch.equal(tensor, start[name]):
            assert_close(tensor - start[name], twin.state_dict()[name] - start[name], 1e-3, name)
    blocks = [name for name in start if "fast_weights" in name and "o_proj" in name and "original" not in name]
    assert blocks
    assert all(not torch.equal(sft.model.state_dict()[name], start[name]) for name in blocks)


def test_sft_by_a_name_sleeps_evaluates_and_reports_its_metrics(tokenizer, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    sft = trainer_of(
        "SFT", tmp_path, TEXTS, str(tmp_path / "model"), tokenizer, {"eval_dataset": Dataset.from_list(TEXTS[:3])}
    )
    batch = sft.data_collator([sft.eval_dataset[i] for i in range(3)])
    metrics = sft.evaluate()
    output = model(**batch)
    assert metrics["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-4)
    targets, logits = batch["labels"][:, 1:], output.logits[:, :-1]
    real = targets != -100
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(
        (logits.argmax(-1) == targets)[real].float().mean().item(), abs=1e-6
    )
    entropy = torch.distributions.Categorical(logits=logits[real]).entropy().mean()
    assert metrics["eval_entropy"] == pytest.approx(entropy.item(), rel=1e-4)


def test_sft_of_completions_scores_them_alone(tokenizer, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    model = tiny()
    sft = trainer_of("SFT", tmp_path, rows, model, tokenizer)
    batch = sft.data_collator([sft.train_dataset[i] for i in range(4)])
    assert (batch["labels"][:, :14] == -100).all()
    sft.compute_loss(model.train(), dict(batch)).backward()
    twin = tiny().train()
    twin(**batch).loss.backward()
    assert_same_gradients(gradients(model), gradients(twin))


@pytest.mark.parametrize(
    "fields", [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 64}], ids=["free", "packed"]
)
def test_sft_without_padding_is_refused(fields, tokenizer, tmp_path):
    """Documents packed into one row would remember each other."""
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    sft = trainer_of("SFT", tmp_path, TEXTS, model, tokenizer, **fields)
    with pytest.raises(ValueError, match="packed"):
        sft.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# DPO.


def test_dpo_compares_what_our_forward_says(tokenizer, tmp_path):
    model, reference, beta = tiny(), tiny(seed=3), 0.1
    passes = count_passes(model), count_passes(reference)
    dpo = trainer_of("DPO", tmp_path, PAIRS, model, tokenizer, {"ref_model": reference}, beta=beta, max_steps=1)
    batch = next(iter(dpo.get_train_dataloader()))
    dpo.compute_loss(model.train(), dict(batch)).backward()
    assert all(numbers.count(3) for numbers in passes)

    twin, twin_reference = tiny(), tiny(seed=3)
    completion = batch["completion_mask"][:, 1:]
    sums = []
    for one in (twin, twin_reference):
        sums.append((log_probs(one, batch["input_ids"], batch["attention_mask"]) * completion).sum(1))
    (chosen, rejected), (reference_chosen, reference_rejected) = (s.chunk(2) for s in sums)
    margin = (chosen - reference_chosen.detach()) - (rejected - reference_rejected.detach())
    loss = -F.logsigmoid(beta * margin).mean()
    loss.backward()
    assert_same_gradients(gradients(model), gradients(twin))
    dpo.train()
    (logged,) = [entry["loss"] for entry in dpo.state.log_history if "loss" in entry]
    assert logged == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("adapter", [False, True])
def test_dpo_refers_to_the_sleeping_model_that_it_began_from(adapter, tokenizer, tmp_path):
    """The adapter switched off, or the checkpoint loaded again: at first the policy is its own reference."""
    tiny().save_pretrained(tmp_path / "model")
    model = AutoModelForSleepLM.from_pretrained(tmp_path / "model")
    others = {"peft_config": sleep_lora_config(model, r=2)} if adapter else {}
    dpo = trainer_of("DPO", tmp_path, PAIRS, model, tokenizer, others)
    assert adapter or type(dpo.ref_model) is type(model)
    dpo.train()
    first, second = [entry["loss"] for entry in dpo.state.log_history if "loss" in entry]
    assert first == pytest.approx(math.log(2), abs=1e-5)
    assert second < first


# GRPO.


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo_samples_and_scores_through_sleep(beta, tokenizer, tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    model = AutoModelForSleepLM.from_pretrained(tmp_path / "model")
    passes = count_passes(model)
    grpo = grpo_of(tmp_path, model, tokenizer, beta=beta, max_steps=3, **{CHECKPOINTING: False})
    seen = []
    score = grpo._compute_loss

    def compute_loss(policy, inputs):
        seen.append((inputs, copy.deepcopy(policy.state_dict())))
        return score(policy, inputs)

    with mock.patch.object(grpo, "_compute_loss", compute_loss):
        grpo.train()
    assert passes.count(3)
    for (_, before), (_, after) in pairwise(seen):
        assert any(not torch.equal(before[name], after[name]) for name in before if "fast_weights" in name)
    inputs, weights = seen[-1]
    assert inputs["advantages"].abs().sum() > 0
    prompt, completion = inputs["prompt_mask"], inputs["completion_mask"]
    assert not prompt[:, 0].all()
    ids, mask = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1), torch.cat([prompt, completion], 1)
    twin = tiny()
    for one in (model, twin):
        one.load_state_dict(weights)
        one.zero_grad()
    # Of the policy that made the samples the ratio is 1, so the gradient is that of what it says of them.
    expected = log_probs(twin, ids, mask)[:, -completion.shape[1] :]
    made, _, _ = grpo._get_per_token_logps_and_entropies(model, ids, mask, completion.shape[1])
    assert_close(made * completion, expected * completion, 1e-4)
    for logps in (made, expected):
        (inputs["advantages"].view(-1, 1) * logps * completion).sum().backward()
    assert_same_gradients(gradients(model), gradients(twin))


def test_grpo_answers_are_those_of_generate(tokenizer, tmp_path):
    """Prompts are left-padded and of many lengths, answers sleep, and the temperature is next to 0."""
    model = tiny()
    grpo = grpo_of(tmp_path, model, tokenizer, temperature=1e-4, max_steps=1)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in PROMPTS]
    answers = grpo._generate_single_turn(prompts, None, {}, 2)[0]
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = tiny().generate(
            torch.tensor([prompt]), max_new_tokens=2 * L, do_sample=False, eos_token_id=1, pad_token_id=0
        )[0, len(prompt) :]
        assert answer == expected.tolist()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
def test_a_stage_keeps_an_adapter_frozen_that_a_trainer_switches_off_and_on(kind, checkpointing, tokenizer, tmp_path):
    """The reference is the model without its adapter, which PEFT trains whenever it is switched on again."""
    model = tiny()
    others = {"peft_config": sleep_lora_config(model, r=2)}
    fields = {CHECKPOINTING: checkpointing, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    if kind == "GRPO":
        others["reward_funcs"] = reward
        fields |= {"num_generations": 2, "max_completion_length": 2 * L, "beta": 0.1}
    rows = PAIRS if kind == "DPO" else PROMPTS
    trainer = trainer_of(kind, tmp_path, rows, model, tokenizer, others, max_steps=3, **fields)
    of_adapter = [p for name, p in trainer.model.named_parameters() if ".lora_" in name]
    seen = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            seen.append((any(p.requires_grad for p in of_adapter), any(p.grad is not None for p in of_adapter)))

    for callback in (HardEvictionWarmup(steps=2), Look()):
        trainer.add_callback(callback)
    trainer.train()
    assert seen == [(False, False)] * 2 + [(True, True)]
    assert all(p.requires_grad for p in of_adapter)
    assert not {"disable_adapter", "set_adapter"} & vars(trainer.model).keys()
