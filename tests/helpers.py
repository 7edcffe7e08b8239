"""Helpers of several test files: models and calls of the laws, comparisons, and how quietly the tests train."""

import dataclasses
from contextlib import contextmanager
from pathlib import Path

import torch
from families import VOCAB, make_model, sleep_config, tokens
from reference import as_implemented, reference_loss, run_block
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_sleep import SleepCache, SleepForCausalLM
from hf_sleep.memory import FastWeights

# Models of the laws, and how they are called.

L = 5
T = 3 * L + 2
EVICTIONS = {"hard": ("hard", 0), "hard+sink": ("hard", 2), "sliding": ("sliding", 0), "sliding+sink": ("sliding", 2)}
LOOPS = {"all": (0, 4), "1-3": (1, 3), "0-2": (0, 2)}


def sleeper(case: str, dtype: torch.dtype = torch.double, **fields) -> SleepForCausalLM:
    """The trained model of a case `family/eviction/N/loop`, or `family/eviction/N/loop/options`."""
    family, eviction, passes, loop, *rest = case.split("/")
    options = "+".join(rest).split("+")
    style, sinks = EVICTIONS[eviction]
    kind = "gated_delta_net" if passes in ("N2", "N4") else "jet"
    defaults = {
        "window_size": L,
        "eviction": style,
        "num_sink_tokens": sinks,
        "sleep_passes": int(passes[1:]),
        "loop_layers": LOOPS[loop],
        "block_kind": kind,
        "between": "gate" if "gate" in options else "none",
        "decay_once": "once" in options,
    }
    return make_model(family, sleep_config(family, **(defaults | fields)), dtype)


def stream(model, ids, sizes, cache=None, **kwargs):
    """Read `[B, T]` in calls of the given numbers of columns: the logits, and the cache."""
    cache = SleepCache() if cache is None else cache
    mask = kwargs.pop("attention_mask", None)
    logits, first = [], 0
    for size in sizes:
        part = slice(first, first + size)
        kwargs["attention_mask"] = None if mask is None else mask[:, part]
        logits.append(model(ids[:, part], cache=cache, **kwargs).logits)
        first += size
    assert first == ids.shape[1]
    return torch.cat(logits, 1), cache


def pad(rows, side, poison=7):
    """Rows of different lengths as `[B, T]` ids and mask, pads on `side` holding a token that would matter if read."""
    width = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), width), poison), torch.zeros(len(rows), width, dtype=torch.long)
    for r, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[r, columns], mask[r, columns] = row, 1
    return ids, mask


def loss_and_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.detach(), {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


def labelled_batch(case: str):
    """Two rows, one padded; labels everywhere or, for N = 2 and 3, in the last window alone as in Algorithm 1."""
    rows = [tokens(T), tokens(L + 3, 2)]
    labels = [row.clone() for row in rows]
    for row in labels:
        row[: len(row) - 2 if case.split("/")[2] in ("N2", "N3") else 2] = -100
    ids, mask = pad(rows, "right")
    padded = torch.where(mask.bool(), pad(labels, "right")[0], -100)
    return rows, labels, {"input_ids": ids, "attention_mask": mask, "labels": padded}


def assert_loss_and_gradients(case, model, tolerance, backprop_windows=None):
    rows, labels, batch = labelled_batch(case)
    model.train()
    loss, gradients = loss_and_gradients(model, model(**batch, backprop_windows=backprop_windows).loss)
    expected_loss, expected = loss_and_gradients(model, reference_loss(model, rows, labels, backprop_windows))
    assert_close(loss, expected_loss, tolerance, "loss")
    assert any(g.abs().max() > 1e-3 for name, g in expected.items() if name.startswith("fast_weights"))
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient, tolerance, f"gradient of {name}")


# What a cache holds: the only helpers that look inside one.


def states(model: SleepForCausalLM, cache: SleepCache, row: int = 0) -> dict:
    """One row's fast weights in the names of the reference: `(S, tail)` of every linear layer and injected block."""
    slots, types = [], getattr(model.lm.config, "layer_types", None) or ()
    for i in range(model.lm.config.num_hidden_layers):
        slots.append(f"layers.{i}" if i < len(types) and types[i] == "linear_attention" else None)
        if str(i) in model.fast_weights:
            slots.append(f"blocks.{i}")
    assert {s for s, name in enumerate(slots) if name} == set(cache.fast_slots)
    return {name: tuple(t[row] for t in cache.memory.carried[s]) for s, name in enumerate(slots) if name}


def with_memory_of(cache: SleepCache, other: SleepCache | None) -> SleepCache:
    """`cache`, with the fast weights of `other`, or zeros."""
    fork = cache.fork()
    layers = list(cache.memory.carried)
    for slot in cache.fast_slots:
        layers[slot] = (
            FastWeights(*map(torch.zeros_like, layers[slot])) if other is None else other.memory.carried[slot]
        )
    start = {slot: layers[slot] for slot in cache.memory.window_start}
    fork.memory = dataclasses.replace(cache.memory, carried=tuple(layers), window_start=start)
    return fork


# Words.

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def word_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of the tests' vocabulary: words `w0`, `w1`, …, a few special ones, and a template of chats."""
    special = ["<end>", "<user>", "<assistant>", "<system>", "<pad>"]
    names = [*special, *(f"w{i}" for i in range(VOCAB - len(special)))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    kept = {"eos_token": "<end>", "pad_token": "<pad>", "additional_special_tokens": special[1:4]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", **kept)
    tokenizer.chat_template = TEMPLATE if chat else None
    return tokenizer


def words(length: int, seed: int = 1) -> str:
    """A text of so many tokens of `word_tokenizer`."""
    return " ".join(
        f"w{i}" for i in torch.randint(0, VOCAB - 5, (length,), generator=torch.Generator().manual_seed(seed))
    )


# Comparisons.


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9, what: str = "") -> None:
    """Largest difference within `tolerance` of 1, or of the largest value where that is larger."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    if not expected.numel():
        return
    error = (actual - expected).abs().max().item()
    assert error <= tolerance * max(1.0, expected.abs().max().item()), f"{what}: off by {error:.2e}"


def assert_same_states(actual: dict, expected: dict, tolerance: float = 1e-9) -> None:
    assert actual.keys() == expected.keys()
    for name, (S, tail) in expected.items():
        assert_close(actual[name][0], S, tolerance, f"S of {name}")
        # The oldest of the W inputs is never read again.
        assert_close(actual[name][1][:, 1:], tail[:, 1:], tolerance, f"tail of {name}")


def assert_same_weights(a: SleepForCausalLM, b: SleepForCausalLM) -> None:
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def stored(folder: Path) -> dict[str, tuple]:
    """Names and shapes of the tensors in all files of a checkpoint; a name that is there twice is an error."""
    shapes: dict[str, tuple] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            assert not shapes.keys() & set(names)
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    return shapes


@contextmanager
def blocks_hooked(model):
    """The base runs its fast-weight blocks after its own layers, from empty memory, over all it is given."""
    handles = []
    for i, block in model.fast_weights.items():
        m = block.mixer
        like = {"dtype": model.lm.dtype}
        S, tail = (
            torch.zeros(m.num_heads, m.head_dim, m.head_v_dim, **like),
            torch.zeros(m.conv_dim, m.conv_size, **like),
        )

        def after(layer, args, output, block=block, S=S, tail=tail):
            return run_block(block, output[0], S, tail, True)[0][None]

        handles.append(model.lm.model.layers[int(i)].register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def flat_logits(model, ids, positions, may_see):
    """N = 1 in one go: the base's own forward with a mask of its own, `may_see(query, key)` by index."""
    config = model.lm.config
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    masks = {"linear_attention": None}
    for name in types - {"linear_attention"}:
        limited = window is not None and (name == "sliding_attention" or not getattr(config, "layer_types", None))
        rows = [
            [
                j <= i and may_see(i, j) and not (limited and positions[i] - positions[j] >= window)
                for j in range(len(ids))
            ]
            for i in range(len(ids))
        ]
        masks[name] = as_implemented(torch.tensor(rows)[None, None], config, model.lm.dtype)
    mask = {name: masks[name] for name in types} if len(types) > 1 else masks["full_attention"]
    with blocks_hooked(model):
        return model.lm(ids[None], attention_mask=mask, position_ids=torch.tensor([positions]), use_cache=False).logits[
            0
        ]


# Training.

QUIET = {
    "report_to": "none",
    "use_cpu": True,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
}


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, and a chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", chat_template=CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "pad_token": "<|im_end|>"})
    return tokenizer


def save_tiny_llama(folder, tokenizer, dtype: torch.dtype = torch.float32, layers: int = 2) -> str:
    """Write a tiny llama with random weights and its tokenizer into `folder`, and return where."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
