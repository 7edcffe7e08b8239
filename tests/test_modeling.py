"""SleepForCausalLM as a model among others: what it refuses, its loss, Trainer, and a stream without end."""

import copy
import functools
import inspect
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from families import VOCAB, make_base, make_model, sleep_config, tokens
from helpers import assert_close, pad
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
)

from hf_sleep import AutoModelForSleepLM, SleepCache, SleepConfig, SleepForCausalLM
from hf_sleep.bases import Decoder
from hf_sleep.compat import CACHE, CHECKPOINTING
from hf_sleep.modeling import compiling as modeling_module

L = 5


def sleeper(family: str = "llama", dtype: torch.dtype = torch.float32, **fields) -> SleepForCausalLM:
    return make_model(family, sleep_config(family, **({"window_size": L} | fields)), dtype)


# What it refuses.

IDS = tokens(6, 3).view(2, 3)
MASK = torch.ones(2, 3, dtype=torch.long)
REFUSED = {
    "no input": ({}, "pass exactly one of input_ids and inputs_embeds"),
    "two inputs": ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 3, 32)}, "pass exactly one of input_ids and"),
    "no tokens": ({"input_ids": IDS[:, :0]}, r"shape \(2, 0\): .* at least one token"),
    "no rows": ({"input_ids": IDS[:0]}, r"shape \(0, 3\): .* at least one token"),
    "one dimension": ({"input_ids": IDS[0]}, r"shape \(3,\): it must be \[batch, tokens\]"),
    "three dimensions": ({"input_ids": IDS[None]}, r"shape \(1, 2, 3\): it must be \[batch, tokens\]"),
    "no embeddings": ({"inputs_embeds": torch.zeros(2, 0, 32)}, r"shape \(2, 0\): .* at least one token"),
    "a negative id": ({"input_ids": IDS - 100}, r"input_ids hold -\d+: ids must be from 0 to 60"),
    "an id of the padded loss": (
        {"input_ids": IDS.clone().fill_(-100)},
        "input_ids hold -100: ids must be from 0 to 60",
    ),
    "an id beyond the vocabulary": (
        {"input_ids": IDS.clone().fill_(VOCAB)},
        "input_ids hold 61: ids must be from 0 to",
    ),
    "a mask with a hole": (
        {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])},
        "attention_mask has zeros between ones in row 1: pads may stand at the ends only",
    ),
    "a short mask": (
        {"input_ids": IDS, "attention_mask": MASK[:, :2]},
        r"attention_mask has shape \(2, 2\): it must be \(2, 3\) or, with the past, \(2, 16\)",
    ),
    "a mask of other rows": ({"input_ids": IDS, "attention_mask": MASK[:1]}, r"\(1, 3\): it must be \(2, 3\)"),
    "a 4-D mask": ({"input_ids": IDS, "attention_mask": MASK[:, None, None]}, r"\(2, 1, 1, 3\): it must be \(2, 3\)"),
    "a 3-D mask": ({"input_ids": IDS, "attention_mask": MASK[:, None]}, r"\(2, 1, 3\): it must be \(2, 3\)"),
    "labels of another width": (
        {"input_ids": IDS, "labels": IDS[:, 1:]},
        r"labels have shape \(2, 2\), the input \(2, 3\)",
    ),
    "labels of other rows": ({"input_ids": IDS, "labels": IDS[:1]}, r"labels have shape \(1, 3\), the input \(2, 3\)"),
    "other rows": ({"input_ids": IDS[:1]}, r"holds 2 sequences, the input 1: use cache\.batch_select_indices"),
    "N of 0": ({"input_ids": IDS, "sleep_passes": 0}, "sleep_passes=0: it must be an integer of at least 1"),
    "N of True": ({"input_ids": IDS, "sleep_passes": True}, "sleep_passes=True: it must be an integer"),
    "N of str": ({"input_ids": IDS, "sleep_passes": "2"}, "sleep_passes='2': it must be an integer"),
    "N of 1.5": ({"input_ids": IDS, "sleep_passes": 1.5}, "sleep_passes=1.5: it must be an integer"),
    "logits of -1": ({"input_ids": IDS, "logits_to_keep": -1}, "logits_to_keep=-1: it must be an integer, 0"),
    "logits of a tensor": (
        {"input_ids": IDS, "logits_to_keep": torch.tensor([1])},
        "logits_to_keep=.* must be an integer",
    ),
    "no backpropagation": ({"input_ids": IDS, "backprop_windows": 0}, "backprop_windows=0: .* at least 1, or None"),
    "positions that restart": (
        {"input_ids": IDS, "position_ids": torch.tensor([[20, 21, 20], [20, 21, 22]])},
        "several packed samples .it has position_ids that restart.: one would remember the other. Turn packing off",
    ),
    "positions that skip": (
        {"input_ids": IDS, "position_ids": torch.tensor([[20, 21, 23]])},
        "several packed samples .it has position_ids that skip.",
    ),
    "positions that were read": (
        {"input_ids": IDS, "position_ids": torch.arange(3).expand(2, 3)},
        "position_ids of row 0 begin again at 0 after 13 tokens that cache has read, as for .* packed samples",
    ),
    "positions of another width": (
        {"input_ids": IDS, "position_ids": torch.arange(13, 17)[None]},
        r"position_ids have shape \(1, 4\): it must be \(2, 3\) or \(1, 3\)",
    ),
    **{
        name: ({"input_ids": IDS, name: torch.tensor([0, 2, 3])}, f"several packed samples .it has {name}.")
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
    },
    "both directions": ({"input_ids": IDS, "is_causal": False}, "is_causal=False: .* no such mode, leave it out"),
    "router logits": ({"input_ids": IDS, "output_router_logits": True}, "output_router_logits=True: .* no such mode"),
    "attentions": ({"input_ids": IDS, "output_attentions": True}, "not supported: a window's layers run several times"),
    "hidden states": ({"input_ids": IDS, "output_hidden_states": True}, "not supported: .* Run model.decoder's layers"),
}


def snapshot(cache: SleepCache) -> tuple:
    """Everything a cache holds, by value."""
    held: list[torch.Tensor] = []
    cache.memory.map(lambda t: held.append(t.clone()) or t)
    return held, [vars(row).copy() for row in cache.memory.counters], cache.memory.columns, cache.fast_slots


def assert_untouched(cache: SleepCache, before: tuple) -> None:
    held, *counters = snapshot(cache)
    assert counters == list(before[1:])
    assert len(held) == len(before[0])
    assert all(torch.equal(a, b) for a, b in zip(held, before[0], strict=True))


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_changes_nothing(case, eviction):
    settings, message = REFUSED[case]
    model = sleeper(eviction=eviction)
    ids, mask = pad([tokens(2 * L + 3, 1), tokens(L, 2)], "left")
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).cache
    before = snapshot(cache)
    with pytest.raises(ValueError, match=message):
        model(cache=cache, **settings)
    assert_untouched(cache, before)
    with torch.no_grad():
        model(IDS, cache=cache)
    assert cache.get_seq_length() == before[2] + 3


def test_a_failure_half_way_changes_nothing():
    """The last layer of the last window breaks, after two sleeps."""
    model, cache = sleeper(), SleepCache()
    with torch.no_grad():
        model(tokens(L - 1)[None], cache=cache)
    before, embeds = snapshot(cache), model.lm.get_input_embeddings()(tokens(2 * L)[None])
    calls = []

    def fail(module, inputs):
        calls.append(cache.memory.counters[0].sleeps)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    handle = model.lm.model.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"), torch.no_grad():
        model(inputs_embeds=embeds, cache=cache)
    handle.remove()
    assert_untouched(cache, before)


def test_a_cache_of_another_model_is_refused():
    model, other = sleeper(), sleeper()
    cache = model(tokens(L)[None], use_cache=True).cache
    before = snapshot(cache)
    for call in (lambda: other(tokens(1)[None], cache=cache), lambda: other.sleep(cache)):
        with pytest.raises(ValueError, match=r"written by another model.*start with an empty SleepCache"):
            call()
    assert_untouched(cache, before)


def test_only_a_sleep_cache_can_be_slept_on():
    model = sleeper()
    with pytest.raises(ValueError, match=r"is a DynamicCache: .* needs a hf_sleep\.SleepCache"):
        model(tokens(L)[None], cache=DynamicCache())
    with pytest.raises(ValueError, match="nothing to sleep on"):
        model.sleep(SleepCache())
    cache = model(tokens(L)[None], use_cache=True).cache
    before = snapshot(cache)
    with pytest.raises(ValueError, match="sleep_passes=0: it must be an integer of at least 1"):
        model.sleep(cache, sleep_passes=0)
    assert_untouched(cache, before)


def test_an_unknown_family_says_what_an_adapter_needs():
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None}
    with pytest.raises(ValueError, match="no decoder adapter for model_type='gpt2'") as error:
        SleepForCausalLM.from_base(GPT2LMHeadModel(GPT2Config(**sizes)))
    for need in (
        "llama",
        "hf_sleep.bases.Decoder",
        "register_base('gpt2')",
        "embed",
        "RoPE",
        "layer",
        "logits",
        "model.layers",
    ):
        assert need in str(error.value)


# What it takes and gives.


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_embeddings_serve_as_ids(family):
    model = sleeper(family)
    ids, mask = pad([tokens(2 * L + 3, 1), tokens(L, 2)], "left")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=True)
        embeds = model.get_input_embeddings()(ids)
        out = model(inputs_embeds=embeds, attention_mask=mask, use_cache=True)
        assert torch.equal(out.logits, expected.logits)
        more = model(tokens(8, 4).view(2, 4), cache=out.cache).logits
        assert torch.equal(more, model(tokens(8, 4).view(2, 4), cache=expected.cache).logits)


@pytest.mark.parametrize("family", ["llama", "gemma3", "granite", "granitemoehybrid"])
def test_embeddings_of_the_caller_s_are_what_they_are_to_the_base(family):
    """Granite multiplies them by `embedding_multiplier`, as it does its own."""
    model, base = make_model(family, sleep_config(family)), make_base(family)
    ids = tokens(14)[None]
    with torch.no_grad():
        embeds = base.get_input_embeddings()(ids)
        assert torch.equal(base(inputs_embeds=embeds).logits, base(ids).logits)
        assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)


@pytest.mark.parametrize("loop", [None, (1, 3)])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_logits_to_keep_is_the_tail_of_all_logits(side, loop):
    model = sleeper(dtype=torch.double, loop_layers=loop, sleep_passes=2)
    ids, mask = pad([tokens(2 * L + 3, 1), tokens(L, 2)], side or "left")
    ids, mask = (ids[:1], None) if side is None else (ids, mask)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        for keep in (1, 4, L, 2 * L + 3, 100):
            logits = model(ids, attention_mask=mask, logits_to_keep=keep).logits
            assert_close(logits, whole[:, -keep:], 1e-6, f"{keep} logits")
            loss = model(ids, attention_mask=mask, logits_to_keep=keep, labels=ids)
            assert torch.equal(loss.logits, model(ids, attention_mask=mask, labels=ids).logits[:, -keep:])


def test_a_tuple_is_given_where_it_is_asked_for():
    model, ids = sleeper(), tokens(2 * L)[None]
    out = model(ids, labels=ids, use_cache=True)
    loss, logits, cache = model(ids, labels=ids, use_cache=True, return_dict=False)
    assert torch.equal(loss, out.loss)
    assert torch.equal(logits, out.logits)
    assert type(cache) is SleepCache
    assert len(model(ids, use_cache=False, return_dict=False)) == 1
    passed = SleepCache()
    assert model(ids, cache=passed).cache is passed
    assert model(ids, cache=SleepCache(), use_cache=False).cache is None


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_cache_comes_where_stock_models_give_one(training, checkpointing, configured):
    base, model, ids = make_base("llama"), sleeper(), tokens(2 * L)[None]
    for each in (base, model):
        each.train(training)
        each.config.use_cache = configured
    # Its model asks; its layers, which would have to be given a function, do not matter here.
    base.model.gradient_checkpointing = model.gradient_checkpointing = checkpointing
    modeling_module.logger.warning_once.cache_clear()
    assert (model(ids).cache is None) == (getattr(base(ids), CACHE) is None)
    assert model(ids, use_cache=False).cache is None
    assert model(ids, use_cache=True).cache.memory.columns == 2 * L
    passed = SleepCache()
    assert model(ids, cache=passed).cache is passed


def test_a_loop_may_rely_on_the_cache_that_comes():
    model, ids = sleeper(dtype=torch.double), tokens(3 * L + 2)[None]
    with torch.no_grad():
        first = model(ids[:, : 2 * L + 1])
        assert_close(model(ids[:, 2 * L + 1 :], cache=first.cache).logits, model(ids).logits[:, 2 * L + 1 :], 1e-6)


def test_trainer_predicts_with_a_cache(tmp_path):
    """The cache that comes with the logits is left out of what is gathered."""
    arguments = TrainingArguments(tmp_path, use_cache=True, report_to="none", use_cpu=True, disable_tqdm=True)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(4 * 12).view(4, 12)]
    trainer = Trainer(sleeper(), arguments)
    assert trainer.model.config.use_cache
    assert trainer.predict(Dataset.from_list(rows)).predictions.shape == (4, 12, VOCAB)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stock_models_take_and_ignore_changes_nothing(side):
    model = sleeper()
    ids, mask = pad([tokens(2 * L + 3, 1), tokens(L, 2)], side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    extras = {
        "position_ids": positions,
        "cache_position": torch.arange(ids.shape[1]),
        "token_type_ids": torch.zeros_like(ids),
        "is_causal": True,
        "output_router_logits": False,
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")),
    }
    expected = model(ids, attention_mask=mask)
    out = model(ids, attention_mask=mask, **extras)
    assert torch.equal(out.logits, expected.logits)
    # They may number the columns as well as the tokens, and count on from what a cache has read.
    more, columns = tokens(4).view(2, 2), torch.arange(ids.shape[1], ids.shape[1] + 2)
    read_on = model(more, cache=out.cache, position_ids=columns[None])
    assert torch.equal(read_on.logits, model(more, cache=expected.cache).logits)
    tokens_read = torch.tensor([[row.seen] for row in read_on.cache.memory.counters])
    model(more, cache=read_on.cache, position_ids=tokens_read + torch.arange(2))
    with pytest.raises(TypeError, match=r"SleepForCausalLM\.forward\(\) got an unexpected keyword argument 'idle'"):
        model(ids, idle=None)


@pytest.mark.parametrize("flash", [False, True])
def test_a_flattened_batch_is_refused(flash):
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=flash, return_seq_idx=flash)
    batch = collator([{"input_ids": tokens(n, n).tolist()} for n in (4, 7)])
    marks = "cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k" if flash else "position_ids that restart"
    with pytest.raises(ValueError, match=f"several packed samples .it has .*{marks}"):
        sleeper()(**batch)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_leaves_it_as_it_is(backend, caplog):
    """A second length, a batch of unequal rows, and a cache from call to call."""
    modeling_module.logger.warning_once.cache_clear()
    model = sleeper()
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    ids, mask = pad([tokens(2 * L + 3, 1), tokens(L, 2)], "left")
    with torch.no_grad():
        for length in (3 * L, 2 * L + 1, 2):
            assert torch.equal(compiled(tokens(length)[None]).logits, model(tokens(length)[None]).logits)
        assert torch.equal(compiled(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
        mine, theirs = SleepCache(), SleepCache()
        for token in range(L + 2):
            more = tokens(1, token)[None]
            assert torch.equal(compiled(more, cache=mine).logits, model(more, cache=theirs).logits)
        assert mine.memory.counters == theirs.memory.counters
        whole = torch.compile(model, backend=backend, fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="a model that sleeps is not compiled"):
            whole(ids)
    loss = compiled.train()(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    assert torch.equal(loss, model(ids, attention_mask=mask, labels=ids).loss)
    assert all(block.mixer.o_proj.weight.grad.any() for block in model.fast_weights.values())
    said = [record.message for record in caplog.records if "torch.compile leaves a model that sleeps" in record.message]
    assert len(said) == 1
    torch.compiler.reset()
    modeling_module.logger.warning_once.cache_clear()


@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_accelerate_unwraps_it_with_its_decorators(monkeypatch):
    """What takes off mixed precision again leaves a model that takes both names of its cache, and is not compiled."""
    model, ids, cache = sleeper(), tokens(2 * L + 1)[None], SleepCache()
    expected, parameters = model(ids).logits, inspect.signature(model.forward).parameters
    assert {"input_ids", "cache", "labels", "sleep_passes"} <= parameters.keys()
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # or it would be every later Accelerator's
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    assert not torch.equal(prepared(ids).logits, expected)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert unwrapped is model
    assert inspect.signature(unwrapped.forward).parameters == parameters
    assert torch.equal(unwrapped(ids, past_key_values=cache).logits, expected)
    assert len(cache.memory.counters) == 1
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a model that sleeps is not compiled"), torch.no_grad():
        torch.compile(unwrapped, backend="eager", fullgraph=True)(ids)
    torch.compiler.reset()
    modeling_module.logger.warning_once.cache_clear()


def test_the_vocabulary_can_grow(tmp_path):
    model = sleeper("qwen3")
    model.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    ids = torch.tensor([[1, VOCAB + 5, 4, VOCAB]])
    logits = model(ids).logits
    assert logits.shape == (1, 4, VOCAB + 6)
    assert model.lm.lm_head.weight is model.lm.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert torch.equal(SleepForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)
    with pytest.raises(ValueError, match="ids must be from 0 to 66"):
        model(ids + 7)


# Loss.


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("training", [False, True])
def test_within_a_window_the_loss_is_the_bases(family, training):
    sleep = sleep_config(family, window_size=16)
    model, base = make_model(family, sleep, trained=False).train(training), make_base(family).train(training)
    ids, mask = pad([tokens(16, 1), tokens(11, 2)], "right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    assert_close(model(**batch).loss, base(**batch).loss, 1e-6)
    for count in (7, torch.tensor(7)):
        assert_close(model(**batch, num_items_in_batch=count).loss, base(**batch, num_items_in_batch=count).loss, 1e-6)
    model(**batch).loss.backward()
    base(**batch).loss.backward()
    for name, parameter in base.named_parameters():
        assert_close(model.lm.get_parameter(name).grad, parameter.grad, 1e-5, name)


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)])
@pytest.mark.parametrize("training", [False, True])
def test_without_a_target_the_loss_is_zero(training, count):
    model = sleeper().train(training)
    ids = tokens(2 * L + 3)[None]
    loss = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=count).loss
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_the_loss_is_the_cross_entropy_of_the_logits(training):
    """Targets count in whatever window they are; labels of pads do not, even where they are not masked."""
    model = sleeper(dtype=torch.double)
    ids, mask = pad([tokens(2 * L + 3, 1), tokens(L + 2, 2)], "left")
    labels = ids.clone()
    labels[0, 3:6] = -100
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    targets = labels.masked_fill(mask == 0, -100)[:, 1:].clone()
    targets[:, :][mask[:, :-1] == 0] = -100
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss = model.train(training)(ids, attention_mask=mask, labels=labels).loss
    assert_close(loss, expected, 1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_without_a_target_the_loss_is_zero_with_a_graph(training):
    """A rank whose batch has no targets must still run its backward."""
    model, ids = sleeper().train(training), tokens(2 * L + 3)[None]
    out = model(ids, labels=torch.full_like(ids, -100))
    assert out.loss.item() == 0
    out.loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()
    assert model.get_input_embeddings().weight.grad is not None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_a_target_every_trainable_parameter_gets_a_gradient(checkpointing):
    """A frozen base changes nothing: DDP waits for the gradient of every parameter that has one elsewhere."""
    model, ids = sleeper().train(), tokens(2 * L + 3)[None]
    model.lm.requires_grad_(False)
    model.gradient_checkpointing = checkpointing
    model(ids, labels=torch.full_like(ids, -100)).loss.backward()
    gradients = [parameter.grad for parameter in model.fast_weights.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_step_without_a_second_pass_gives_the_gate_a_gradient_too(passes):
    """DDP waits for one."""
    model, ids = sleeper(between="gate").train(), tokens(2 * L + 3)[None]
    for labels, skip_head in ((ids, False), (None, False), (None, True)):
        model.zero_grad()
        answer = model(ids, labels=labels, sleep_passes=passes, skip_head=skip_head)
        (answer.loss if labels is not None else answer[0].square().mean()).backward()
        assert model.between.gate.grad.any() == (passes > 1)


def test_logits_are_made_in_training_where_they_are_asked_for():
    model, ids = sleeper().train(), tokens(2 * L + 3)[None]
    out = model(ids, labels=ids, logits_to_keep=2)
    assert out.logits.shape[1] == 2
    assert torch.allclose(out.loss, model(ids, labels=ids).loss)


def test_a_base_that_checkpoints_itself_hands_that_over():
    """Its own checkpointing drops the cache in training, and with it the window."""
    base = make_base("llama").train()
    for module in base.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    model = SleepForCausalLM.from_base(base, sleep_config("llama", window_size=L, eviction="sliding"))
    assert model.gradient_checkpointing
    ids = tokens(3 * L)[None]
    model(ids, labels=ids).loss.backward()
    base.model.layers[0].gradient_checkpointing = True
    again = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    base.model.layers[0]._gradient_checkpointing_func = again
    with pytest.raises(RuntimeError, match="gradient checkpointing off"):
        model(ids, labels=ids)


def test_sleep_in_idle_time_keeps_no_graph():
    model, cache = sleeper(), SleepCache()
    with torch.no_grad():
        model(tokens(L - 1)[None], cache=cache)
    model.sleep(cache)
    assert not any(t.requires_grad for pair in cache.memory.carried if pair for t in pair)


def test_a_cache_says_how_it_can_be_kept():
    cache = SleepCache()
    sleeper()(tokens(3)[None], cache=cache)
    with pytest.raises(TypeError, match=r"SleepState\.from_cache"):
        pickle.dumps(cache)
    assert copy.copy(cache).memory is cache.memory


# The warning of untrained blocks.


@pytest.fixture
def warned(caplog):
    """Messages of hf_sleep's logger, whose once-only memory is cleared."""
    modeling_module.logger.warning_once.cache_clear()
    yield lambda: [record.message for record in caplog.records if "never trained" in record.message]
    modeling_module.logger.warning_once.cache_clear()


def test_an_untrained_model_warns_once_when_it_first_sleeps(warned):
    model = make_model("llama", sleep_config("llama", window_size=L), trained=False)
    model(tokens(L)[None])
    assert not warned()
    for _ in range(2):
        model(tokens(L + 1)[None])
    other = make_model("llama", sleep_config("llama", window_size=L), trained=False)
    other(tokens(L + 1)[None])
    assert len(warned()) == 1


@pytest.mark.parametrize("case", ["trained", "training"])
def test_others_are_not_warned(case, warned):
    model = make_model("llama", sleep_config("llama", window_size=L), trained=case == "trained")
    model.train(case == "training")(tokens(2 * L)[None])
    assert not warned()


@pytest.mark.parametrize("trained", [False, True])
def test_a_hybrid_warns_unless_it_was_trained_since_it_was_retrofitted(trained, warned):
    model = make_model("qwen3_next", sleep_config("qwen3_next", window_size=L, block_layers=()), trained=False)
    model.train(trained)(tokens(2 * L)[None])
    model.eval()(tokens(2 * L)[None])
    assert len(warned()) == (not trained)


def test_the_warning_says_how_to_slide_untrained(warned):
    sleep = sleep_config("llama", window_size=L, eviction="sliding", sleep_passes=3)
    make_model("llama", sleep, trained=False)(tokens(2 * L)[None])
    assert "sleep_passes=1 or between='gate'" in warned()[0]


def test_with_a_closed_gate_an_untrained_model_may_slide(warned):
    sleep = sleep_config("llama", window_size=L, eviction="sliding", sleep_passes=3, between="gate")
    make_model("llama", sleep, trained=False)(tokens(2 * L)[None])
    assert "sleep_passes=1" not in warned()[0]


# Trainer.


@pytest.mark.parametrize("checkpointing", [False, True])
def test_plain_trainer_trains_it(checkpointing, tmp_path):
    model = make_model("llama", sleep_config("llama", window_size=L, sleep_passes=2), trained=False)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(8 * 12).view(8, 12)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        **{CHECKPOINTING: checkpointing},
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    data = Dataset.from_list(rows)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    # The mean over targets of a random model, whatever the accumulation: near ln(vocabulary), not twice that.
    assert all(3 < loss < 6 for loss in losses)
    assert model.gradient_checkpointing is checkpointing
    assert not any(block.is_untrained for block in model.fast_weights.values())
    metrics = trainer.evaluate()
    assert 3 < metrics["eval_loss"] < 6
    assert trainer.predict(data).predictions.shape == (8, 12, VOCAB)


# A stream without end.


def test_past_a_million_tokens_nothing_has_drifted():
    """Sliding eviction with a sink: what a period of the stream reads as does not depend on how much came before."""
    size = 256
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=2 * size + 1,
    )
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    blocks = {"block_kind": "gated_delta_net", "block_num_heads": 1, "block_head_dim": 1}
    sleep = SleepConfig(window_size=size, eviction="sliding", num_sink_tokens=1, sleep_passes=1, **blocks)
    model = SleepForCausalLM.from_base(base, sleep)
    model._advice.may_be_untrained = False
    period, cache = tokens(size)[None], SleepCache()
    chunk = period.repeat(1, 128)
    with torch.no_grad():
        model(period.repeat(1, 4), cache=cache, logits_to_keep=1)
        early = model(period, cache=cache.fork()).logits
        while cache.memory.counters[0].seen <= 2**20:
            model(chunk, cache=cache, logits_to_keep=1)
            assert cache.memory.counters[0].position <= sleep.max_position
        late = model(period, cache=cache).logits
        assert torch.equal(late, early)
        # It does depend on what came right before, so the comparison is of something.
        assert not torch.equal(model(period).logits, early)
    assert cache.memory.counters[0].seen == cache.get_seq_length() > 2**20
    assert cache.memory.counters[0].position <= sleep.max_position
    assert cache.max_kv_length <= 2 * size


def test_the_base_model_can_be_frozen_as_of_any_model():
    model = sleeper()
    for parameter in model.base_model.parameters():
        parameter.requires_grad = False
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.base_model.config is model.config


def test_a_replica_of_data_parallel_says_what_to_use():
    replica = sleeper()._replicate_for_data_parallel()
    replica._modules = {}  # its submodules are replicas too, which hold no parameters
    with pytest.raises(ValueError, match=r"nn\.DataParallel, in which Trainer .* torchrun or accelerate launch"):
        replica(IDS)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_retrofit_returns_a_cache_where_its_base_does(use_cache):
    base = make_base("llama")
    base.config.use_cache = use_cache
    model = SleepForCausalLM.from_base(base, sleep_config("llama"))
    assert (CACHE in base(IDS), model(IDS).cache is not None) == (use_cache, use_cache)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_an_empty_tensor_asks_for_no_logits(eviction):
    model = make_model("llama", sleep_config("llama", window_size=5, sleep_passes=2, eviction=eviction))
    ids, nothing = torch.stack((tokens(17), tokens(17, 2))), torch.empty(0, dtype=torch.long)
    asked, unasked, heads = SleepCache(), SleepCache(), []
    with torch.no_grad():
        model(ids, cache=asked)
        handle = model.lm.lm_head.register_forward_hook(lambda *_: heads.append(1))
        out = model(ids, cache=unasked, logits_to_keep=nothing)
        handle.remove()
        assert out.logits.shape == (2, 0, model.config.text_config.vocab_size)
        assert not heads
        assert torch.equal(model(ids[:, :3], cache=unasked).logits, model(ids[:, :3], cache=asked).logits)
    with pytest.raises(ValueError, match="logits_to_keep says that nothing is asked, and labels ask for a loss"):
        model(ids, labels=ids, logits_to_keep=nothing)


# What a base's config says, and who watches.


@pytest.mark.parametrize("family", ["llama", "olmo2", "granite", "stablelm", "glm4", "cohere"])
@pytest.mark.parametrize("stray", [{"sliding_window": 4}])
def test_what_a_family_s_config_does_not_have_its_model_does_not_read(family, stray, tmp_path):
    base = make_base(family)
    base.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | stray), encoding="utf-8")
    model = AutoModelForSleepLM.from_pretrained(tmp_path, sleep={"window_size": 64}).eval()
    ids = tokens(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)
        assert torch.equal(model.lm(ids).logits, base(ids).logits)


def test_a_config_from_outside_may_hand_on_what_its_parent_reads():
    class Handed(PreTrainedConfig):
        def __init__(self, extra=1, **kwargs):
            self.extra = extra
            super().__init__(**kwargs)

    assert Decoder.layer_kinds(Handed(num_hidden_layers=2, sliding_window=4)) == ["sliding_attention"] * 2
    assert Decoder.layer_kinds(LlamaConfig(num_hidden_layers=2, sliding_window=4)) == ["full_attention"] * 2


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_a_base_that_reads_ahead_is_refused(family):
    base = make_base(family)
    base.config.is_causal = False
    with pytest.raises(ValueError, match=r"text_config\.is_causal=False: such a model reads ahead"):
        SleepForCausalLM.from_base(base)


def test_block_masks_are_not_made():
    model = make_model("llama", sleep_config("llama"))
    model.lm.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation='flex_attention' takes block masks"):
        model(tokens(3)[None])


def test_embeddings_are_dropped_in_training_as_the_base_drops_them():
    model = make_model("starcoder2", sleep_config("starcoder2", window_size=6))
    model.lm.config.embedding_dropout = model.lm.model.embedding_dropout = 0.5
    ids = tokens(9)[None]
    drawn = []
    for training in (True, True, False):
        torch.manual_seed(3)
        drawn.append(model.train(training).decoder.embed(ids))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[2], model.lm.model.embed_tokens(ids))
    torch.manual_seed(3)
    plain = torch.nn.functional.dropout(drawn[2], 0.5)
    assert torch.equal(drawn[0], plain)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_at_pads_of_the_caller_s_embeddings_is_never_read(side):
    model = make_model("llama", sleep_config("llama", window_size=6), torch.double)
    rows = [tokens(13), tokens(5, 1), tokens(9, 2)]
    ids, mask = pad(rows, side)
    embeds = model.lm.get_input_embeddings()(ids).detach()
    expected = model(ids, attention_mask=mask).logits
    embeds[mask == 0] = float("nan")
    logits = model(inputs_embeds=embeds, attention_mask=mask).logits
    assert torch.equal(logits[mask == 1], expected[mask == 1])


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_is_not_watched_by_who_watches_the_model(how):
    model, heard = make_model("llama", sleep_config("llama", window_size=6)), []
    with model.on_sleep(heard.append), model.register_pass_hook(heard.append):
        copied = how(model)
        copied(tokens(13)[None])
        assert not heard
        model(tokens(13)[None])
        assert heard


def test_rows_of_a_cache_count_from_the_end_too():
    model, cache = make_model("llama", sleep_config("llama", window_size=6)), SleepCache()
    model(torch.stack([tokens(8), tokens(8, 1)]), cache=cache)
    logits = []
    for row in (-1, 1):
        last = cache.fork()
        last.batch_select_indices(torch.tensor([row]))
        logits.append(model(tokens(3)[None], cache=last).logits)
    assert torch.equal(*logits)
    with pytest.raises(IndexError, match="row 2 of a cache with 2 rows"):
        cache.batch_select_indices(torch.tensor([2]))


def test_training_without_the_routers_loss_is_said_once(caplog):
    modeling_module.logger.warning_once.cache_clear()
    model = make_model("mixtral", sleep_config("mixtral", window_size=6))
    model.config.text_config.output_router_logits = True
    ids = tokens(13)[None]
    model.eval()(ids)
    assert "output_router_logits" not in caplog.text
    for _ in range(2):
        model.train()(ids, labels=ids)
    assert caplog.text.count("output_router_logits=True asks for a loss") == 1
