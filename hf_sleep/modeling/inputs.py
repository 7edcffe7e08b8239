"""Inputs of a call: which of its columns are tokens, and all checks. They come before anything is changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..cache import SleepCache
from ..memory import Memory
from ..packing import MARKS, refuse_packed

# Further keywords of stock models: those that no answer here depends on, and values with which others say nothing.
UNUSED_KEYWORDS = ("cache_position", "token_type_ids", "skip_logits")
SAYING_NOTHING = {
    "is_causal": (None, True),
    "output_router_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}


@dataclass(frozen=True)
class Layout:
    """Places of the real tokens in a call's columns.

    Args:
        start: first real column per row.
        counts: real tokens per row.
        width: columns of the call.
    """

    start: list[int]
    counts: list[int]
    width: int

    @classmethod
    def of_all(cls, batch_size: int, width: int) -> "Layout":
        """Lay out a call in which every column holds a token."""
        return cls([0] * batch_size, [width] * batch_size, width)

    @classmethod
    def of_mask(cls, mask: torch.Tensor) -> "Layout":
        """Lay out the tokens of `mask` `[B, width]`, 0 at pads.

        Raises:
            ValueError: a pad between two tokens of a row.
        """
        real = mask.detach().to("cpu") != 0
        batch, width = real.shape
        if bool(real.all()):
            return cls.of_all(batch, width)
        counts = real.sum(1)
        start = torch.where(counts > 0, real.int().argmax(1), 0)
        last = width - real.flip(1).int().argmax(1)
        if bool(holes := ((counts > 0) & (last - start != counts)).nonzero().flatten().tolist()):
            raise ValueError(
                f"attention_mask has zeros between ones in row {holes[0]}: pads may stand at the ends only. Move them "
                "there, or pass the parts one after the other with cache"
            )
        return cls(start.tolist(), counts.tolist(), width)

    @property
    def is_full(self) -> bool:
        """Tell whether every column of every row holds a token."""
        return min(self.counts) == self.width

    def mask(self) -> torch.Tensor:
        """`[B, width]`, whether a column holds a token."""
        column = torch.arange(self.width)
        start, counts = (torch.tensor(values).unsqueeze(1) for values in (self.start, self.counts))
        return (column >= start) & (column < start + counts)

    def compact(self, t: torch.Tensor) -> torch.Tensor:
        """`[B, width, ...]` with each row's real tokens moved to the front."""
        if not any(self.start):
            return t
        column = torch.arange(max(1, *self.counts), device=t.device)
        index = (column + torch.tensor(self.start, device=t.device).unsqueeze(1)).clamp(max=self.width - 1)
        return torch.take_along_dim(t, index.view(*index.shape, *(1,) * (t.dim() - 2)), dim=1)

    def zeroed(self, t: Any) -> Any:
        """`[B, width, C]` with zeros at pads, where there may be anything, NaN too; `None` as it is."""
        return t if t is None or self.is_full else t.masked_fill(~self.mask().to(t.device).unsqueeze(-1), 0)

    def lengthened(self, longest: int) -> "Layout":
        """Lengthen the longest row to `longest` tokens: those after its end count as real."""
        row = max(range(len(self.counts)), key=self.counts.__getitem__)
        counts = [longest if b == row else n for b, n in enumerate(self.counts)]
        return Layout(self.start, counts, max(self.width, self.start[row] + longest))


def check_keywords(owner: str, keywords: Mapping[str, Any]) -> None:
    """Check what stock models take besides the named arguments.

    Args:
        owner: the class whose forward was called.
        keywords: by name.

    Raises:
        TypeError: an unknown one.
        ValueError: one that asks for what a sleeping model has not, or says that samples are packed.
    """
    for name, value in keywords.items():
        if name in SAYING_NOTHING and value not in SAYING_NOTHING[name]:
            if name.startswith("output_") and name != "output_router_logits":
                raise ValueError(
                    "output_attentions and output_hidden_states are not supported: a window's layers run several "
                    "times, so there is no one answer. Run model.decoder's layers to look inside"
                )
            raise ValueError(f"{name}={value!r}: a model that sleeps has no such mode, leave it out")
        if name not in (*SAYING_NOTHING, *UNUSED_KEYWORDS, *MARKS):
            raise TypeError(f"{owner}.forward() got an unexpected keyword argument {name!r}")
    refuse_packed(keywords)


def check_checkpointing(gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1) -> None:
    """Check how a Trainer asks for activations to be recomputed.

    Raises:
        ValueError: settings of a model that does it layer by layer.
    """
    if every_n_layers != 1:
        raise ValueError(f"every_n_layers={every_n_layers}: a sleeping model recomputes whole windows, leave it out")
    if getattr(gradient_checkpointing_func, "func", checkpoint) is not checkpoint:
        raise ValueError("offload=True: a sleeping model recomputes whole windows and keeps nothing else, leave it out")


def check_settings(logits_to_keep: Any, backprop_windows: Any, skip_head: bool, labels: Any, token_loss: Any) -> None:
    """Check the settings of a forward that stand for themselves."""
    asks_none = isinstance(logits_to_keep, torch.Tensor) and not logits_to_keep.numel()
    if not asks_none and (not isinstance(logits_to_keep, int) or logits_to_keep < 0):
        raise ValueError(
            f"logits_to_keep={logits_to_keep!r}: it must be an integer, 0 (all columns) or more, or an empty tensor "
            "(none)"
        )
    if asks_none and labels is not None:
        raise ValueError("logits_to_keep says that nothing is asked, and labels ask for a loss: leave one of them out")
    if backprop_windows is not None and (type(backprop_windows) is not int or backprop_windows < 1):
        raise ValueError(
            f"backprop_windows={backprop_windows!r}: it must be an integer of at least 1, or None for all windows"
        )
    if skip_head and labels is not None:
        raise ValueError("skip_head=True with labels: a loss needs the head. Leave one of them out")
    if token_loss is not None and not callable(token_loss):
        raise ValueError(
            f"token_loss={token_loss!r}: it must be a function of (logits, targets, rows, columns), or None for "
            "cross-entropy"
        )
    if token_loss is not None and labels is None:
        raise ValueError("token_loss without labels: it is of targets. Pass labels, or leave it out")


def memory_in(cache: SleepCache | None, model: Any) -> Memory:
    """Take what `cache` holds for `model`; of none, the memory of no sequence at all.

    Raises:
        ValueError: a cache of another kind, or of another model.
    """
    if cache is None:
        return Memory()
    check_cache(cache, model)
    return cache.memory


def check_cache(cache: SleepCache, model: Any) -> None:
    """Check that `model` can continue from `cache`.

    Raises:
        ValueError: a cache of another kind, or of another model.
    """
    if not isinstance(cache, SleepCache):
        raise ValueError(
            f"cache is a {type(cache).__name__}: a sleeping model needs a hf_sleep.SleepCache (make an empty one, or "
            "let generate make it)"
        )
    if not cache.is_empty and not cache.belongs_to(model):
        raise ValueError(
            "cache was written by another model, whose fast weights mean nothing to this one: start with an empty "
            "SleepCache"
        )
    if not cache.is_empty:
        cache.check_settings(model)


def check_inputs(
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    labels: torch.Tensor | None,
    memory: Memory,
    vocab_size: int,
) -> Layout:
    """Check a forward's tensors against each other and against what was read.

    Raises:
        ValueError: what cannot be read.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    given: Any = inputs_embeds[..., 0] if inputs_embeds is not None else input_ids
    if given.dim() != 2 or not given.numel():
        raise ValueError(
            f"the input has shape {tuple(given.shape)}: it must be [batch, tokens], with at least one token that the "
            "cache has not read (generate with a cache takes the whole conversation)"
        )
    if inputs_embeds is None:
        low, high = torch.stack(torch.aminmax(given)).tolist()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"input_ids hold {low if low < 0 else high}: ids must be from 0 to {vocab_size - 1}")
    batch, width = given.shape
    check_rows(memory, batch)
    if labels is not None and labels.shape != given.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, the input {tuple(given.shape)}: they must be the same (the "
            "shift by one token is done inside)"
        )
    if attention_mask is None:
        return Layout.of_all(batch, width)
    if attention_mask.dim() != 2 or attention_mask.shape not in ((batch, width), (batch, memory.columns + width)):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: it must be {(batch, width)}"
            + (f" or, with the past, {(batch, memory.columns + width)}" if memory.columns else "")
        )
    if attention_mask.shape[1] > width:
        memory.check_past(attention_mask[:, :-width])
    return Layout.of_mask(attention_mask[:, -width:])


def check_rows(memory: Memory, batch: int) -> None:
    """Check that an input has as many rows as a memory, which may be of no sequence at all."""
    if memory.counters and len(memory.counters) != batch:
        raise ValueError(
            f"cache holds {len(memory.counters)} sequences, the input {batch}: use cache.batch_select_indices or "
            "batch_repeat_interleave to match them"
        )


def ends_of(sleep_after: torch.Tensor | None, layout: Layout) -> list[list[int]] | None:
    """Per row, after how many of its tokens it sleeps, ascending, as `sleep_after` `[B, T]` marks them.

    Raises:
        ValueError: another shape, other values than 0 and 1, or a mark at a pad.
    """
    if sleep_after is None:
        return None
    check_marks(sleep_after)
    shape = (len(layout.counts), layout.width)
    if tuple(sleep_after.shape) != shape:
        raise ValueError(f"sleep_after has shape {tuple(sleep_after.shape)}: it must be {shape}, the input's")
    marks = sleep_after.detach().cpu()
    if marks.is_floating_point() or not bool(((marks == 0) | (marks == 1)).all()):
        raise ValueError("sleep_after must hold 0 and 1, or be boolean: 1 at a token after which its row sleeps")
    columns = [row.nonzero().flatten().tolist() for row in marks]
    ends = [[c - start + 1 for c in row] for row, start in zip(columns, layout.start, strict=True)]
    for b, (row, count) in enumerate(zip(ends, layout.counts, strict=True)):
        if wrong := [end for end in row if not 1 <= end <= count]:
            raise ValueError(
                f"sleep_after is 1 at column {wrong[0] + layout.start[b] - 1} of row {b}, which is a pad: mark the "
                "token before it"
            )
    return ends


def check_marks(sleep_after: Any) -> None:
    """Check that marks are a tensor, whose shape and values are checked where the input is known."""
    if not isinstance(sleep_after, torch.Tensor):
        raise ValueError(f"sleep_after is a {type(sleep_after).__name__}: it must be a tensor [B, T] of 0 and 1")


def check_positions(position_ids: torch.Tensor | None, layout: Layout, memory: Memory) -> None:
    """Check that positions only say that a row's tokens come one after the other.

    Raises:
        ValueError: positions that restart or skip, or do not fit the input.
    """
    if position_ids is None:
        return
    batch = len(layout.counts)
    if position_ids.shape[-1] != layout.width or position_ids.shape[-2:-1] not in ((1,), (batch,)):
        raise ValueError(
            f"position_ids have shape {tuple(position_ids.shape)}: it must be {(batch, layout.width)} or "
            f"{(1, layout.width)}"
        )
    refuse_packed({"position_ids": position_ids}, layout.mask())
    positions = position_ids.expand(batch, -1) if position_ids.dim() == 2 else position_ids[0].expand(batch, -1)
    first = positions.detach().cpu()[range(batch), layout.start].tolist()
    for b, (position, count, row) in enumerate(zip(first, layout.counts, memory.counters, strict=False)):
        if count and position < row.seen:
            raise ValueError(
                f"position_ids of row {b} begin again at {position} after {row.seen} tokens that cache has read, as "
                "for the next of several packed samples: one would remember the other. Give each sample a cache of its "
                "own"
            )
