"""Outputs of a call: logits and loss, made of what was read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging

from ..bases.decoder import Decoder
from ..engine import Read
from ..labels import IGNORED, next_labels
from .inputs import Layout

logger = logging.get_logger(__name__)

TokenLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Function of logits `[n, vocab]`, targets, rows and columns, each `[n]`, to a loss that is summed over the n."""


@dataclass(frozen=True)
class Asked:
    """Request of a call: what it wants of what is read.

    Args:
        layout: of the columns that are read.
        columns: of the call, which are the first of those that are read.
        keep: how many of the last of them the caller wants to see.
        targets: `[B, width]`, per column the label of the next; `None` without labels.
        targets_by_row: `[B, T]` on the CPU, left-aligned, where logits are made just where there is a target.
        columns_needed: how many of the last columns need logits.
        wanted: per row and real token, whether its logits are needed; `None` for all.
    """

    layout: Layout
    columns: int
    keep: int
    targets: torch.Tensor | None
    targets_by_row: torch.Tensor | None
    columns_needed: int
    wanted: list[list[bool]] | None

    @classmethod
    def of(
        cls,
        labels: torch.Tensor | None,
        layout: Layout,
        read: Layout,
        logits_to_keep: int | torch.Tensor,
        in_training: bool,
    ) -> "Asked":
        """Read what labels and settings ask for.

        Args:
            labels: `[B, T]`, or `None`.
            layout: of the call's columns.
            read: of those that are read: `layout` itself, or where ranks read in step a longer one.
            logits_to_keep: how many of the last columns the caller wants to see, 0 for all, an empty tensor for none.
            in_training: whether nobody wants to see logits that have no target.
        """
        last = 0 if isinstance(logits_to_keep, torch.Tensor) else logits_to_keep or layout.width
        keep, in_step = min(last, layout.width), read is not layout
        if labels is None:
            needed = read.width if in_step else keep
            return cls(read, layout.width, keep, None, None, needed, None if in_step else _wanted_columns(read, needed))
        real = None if layout.is_full else layout.mask().to(labels.device)
        targets = F.pad(next_labels(labels, real), (0, read.width - layout.width), value=IGNORED)
        # A loss needs all columns, whatever the caller wants to see of them.
        if not in_training or logits_to_keep:
            return cls(read, layout.width, keep, targets, None, read.width, None)
        by_row = read.compact(targets).cpu()
        wanted = None if in_step else _wanted_targets(read, by_row)
        return cls(read, layout.width, keep, targets, by_row, read.width, wanted)


def _wanted_columns(layout: Layout, keep: int) -> list[list[bool]] | None:
    if keep >= layout.width:
        return None
    first = layout.width - keep
    return [
        [start + j >= first for j in range(count)] for start, count in zip(layout.start, layout.counts, strict=True)
    ]


def _wanted_targets(layout: Layout, targets: torch.Tensor) -> list[list[bool]]:
    wanted = (targets != IGNORED).tolist()
    if not any(map(any, wanted)):
        # Somewhere, for a loss of 0 that has a graph.
        row = max(range(len(wanted)), key=layout.counts.__getitem__)
        wanted[row][max(0, layout.counts[row] - 1)] = True
    return wanted


def answer(
    asked: Asked,
    reads: Sequence[Read],
    decoder: Decoder,
    x: torch.Tensor,
    vocab_size: int,
    skip_head: bool,
    is_checkpointing: bool,
    token_loss: TokenLoss | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Make what was asked for.

    Args:
        asked: for what.
        reads: what was read.
        decoder: has the head.
        x: the embeddings that were read, `[B, T, C]`.
        vocab_size: width of the logits.
        skip_head: return what the head takes instead of logits.
        is_checkpointing: make the logits of a loss again in the backward.
        token_loss: instead of cross-entropy.

    Returns:
        Logits `[B, keep, vocab]`, `None` where they are made just for the loss, and the summed loss, if any.
    """
    if asked.targets_by_row is not None:
        by_row = asked.targets_by_row
        loss = loss_of_reads(decoder.logits, reads, by_row, asked.layout.start, is_checkpointing, token_loss)
        return None, x.float().sum() * 0.0 if loss is None else loss  # all pads
    size = x.shape[-1] if skip_head else vocab_size
    head = decoder.head_input if skip_head else decoder.logits
    logits = logits_of_reads(head, reads, asked.layout, asked.columns_needed, size, x)
    loss = None if asked.targets is None else summed_loss(logits, asked.targets, token_loss)
    logits = logits[:, : asked.columns] if asked.layout.width > asked.columns else logits
    return logits[:, logits.shape[1] - asked.keep :], loss


def logits_of_reads(
    head: Callable[[torch.Tensor], torch.Tensor],
    reads: Sequence[Read],
    layout: Layout,
    keep: int,
    size: int,
    like: torch.Tensor,
) -> torch.Tensor:
    """Logits in the caller's columns, zeros at pads.

    Args:
        head: `[..., C]` to `[..., vocab]`.
        reads: what was read.
        layout: of the call's columns.
        keep: how many of the last columns.
        size: of what `head` makes.
        like: a tensor whose dtype and device the answer has where all is pads.

    Returns:
        `[B, keep, size]`.
    """
    parts = [read for read in reads if read.hidden is not None]
    batch, first = len(layout.counts), layout.width - keep
    is_whole = all(
        len(read.span.rows) == batch and len(set(read.span.start)) == len(set(read.span.counts)) == 1 for read in parts
    )
    if parts and is_whole and layout.is_full:
        windows: Any = [read.hidden for read in parts]
        return head(torch.cat(windows, dim=1)[:, -keep:])
    # Out of place, so that an eval-mode loss still has its gradient.
    rows, columns, tokens = [], [], []
    for read in parts:
        hidden: Any = read.hidden
        for i, (b, start, count) in enumerate(zip(read.span.rows, read.span.start, read.span.counts, strict=True)):
            low = min(count, max(0, first - start - layout.start[b]))
            column = torch.arange(low, count) + start + layout.start[b] - first
            rows.append(torch.full_like(column, b))
            columns.append(column)
            tokens.append(hidden[i, low:count])
    if not tokens:
        return like.new_zeros(batch, keep, size)
    logits = head(torch.cat(tokens))
    index = (torch.cat(rows).to(logits.device), torch.cat(columns).to(logits.device))
    return logits.new_zeros(batch, keep, size).index_put(index, logits)


def loss_of_reads(
    head: Callable[[torch.Tensor], torch.Tensor],
    reads: Sequence[Read],
    targets: torch.Tensor,
    first: Sequence[int],
    is_checkpointing: bool,
    token_loss: TokenLoss | None = None,
) -> torch.Tensor | None:
    """Summed loss, window by window: logits are made only where there is a target, and not kept.

    Args:
        head: `[..., C]` to `[..., vocab]`.
        reads: what was read.
        targets: `[B, T]`, left-aligned.
        first: per row, the caller's column of its first token.
        is_checkpointing: make the logits again in the backward.
        token_loss: instead of cross-entropy.

    Returns:
        `None` where nothing was read.
    """

    def of_hidden(
        hidden: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        return loss_of_targets(head(hidden), targets, rows, columns, token_loss)

    total: torch.Tensor | None = None
    for read in reads:
        if read.hidden is None:
            continue
        window = torch.full(read.hidden.shape[:2], IGNORED)
        for i, (b, start, count) in enumerate(zip(read.span.rows, read.span.start, read.span.counts, strict=True)):
            window[i, :count] = targets[b, start : start + count]
        row, column = (window != IGNORED).nonzero(as_tuple=True)
        begins = torch.tensor([start + first[b] for b, start in zip(read.span.rows, read.span.start, strict=True)])
        places = torch.tensor(read.span.rows)[row], column + begins[row]
        hidden, wanted = read.hidden[row.to(read.hidden.device), column.to(read.hidden.device)], window[row, column]
        if not len(row):
            # Adds nothing, but gives the loss its graph: a rank without targets must run its backward too.
            hidden, wanted = read.hidden[:1, 0], torch.full((1,), IGNORED)
        arguments = hidden, *(index.to(hidden.device) for index in (wanted, *places))
        part = checkpoint(of_hidden, *arguments, use_reentrant=False) if is_checkpointing else of_hidden(*arguments)
        total = part if total is None else total + part
    return total


def loss_of_targets(
    logits: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    token_loss: TokenLoss | None,
) -> torch.Tensor:
    """Sum the loss of targets; where there are none, 0 that has the logits' graph.

    Args:
        logits: `[n, vocab]`.
        targets: `[n]`; a lone `IGNORED` where there are none.
        rows: `[n]`, of the call; empty where there are none.
        columns: `[n]`, of the call; empty where there are none.
        token_loss: instead of cross-entropy.

    Raises:
        ValueError: what `token_loss` returned is no sum.
    """
    if token_loss is None:
        return summed_cross_entropy(logits, targets)
    if not len(rows):
        return 0.0 * logits.sum()
    loss = token_loss(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, rows, columns)
    if not isinstance(loss, torch.Tensor) or loss.shape:
        given = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise ValueError(
            f"token_loss returned {given}: it must be a tensor without dimensions, summed over the targets"
        )
    return loss


def reaching(
    module: nn.Module, loss: torch.Tensor | None, logits: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Loss and logits, from which a gradient reaches every parameter of `module`, of zeros where none does otherwise.

    DDP waits for one, and a step of one pass has none for what lies between passes. It comes through the loss; without
    labels, through the logits.
    """
    parts = [p.sum() for p in module.parameters() if p.requires_grad]
    reached = logits if loss is None else loss
    if not parts or reached is None:
        return loss, logits
    reached = reached + 0.0 * sum(part.to(reached.device, reached.dtype) for part in parts)
    return (None, reached) if loss is None else (reached, logits)


def summed_loss(logits: torch.Tensor, targets: torch.Tensor, token_loss: TokenLoss | None) -> torch.Tensor:
    """Sum the loss of logits `[B, T, vocab]` in the caller's columns; `targets` are `[B, T]`."""
    if token_loss is None:
        return summed_cross_entropy(logits, targets)
    targets = targets.to(logits.device)
    rows, columns = (targets != IGNORED).nonzero(as_tuple=True)
    return loss_of_targets(logits[rows, columns], targets[rows, columns], rows, columns, token_loss)


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum the cross-entropy of logits `[..., vocab]`, in fp32 at least; targets of `IGNORED` do not count."""
    high = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.to(logits.device).flatten()
    return F.cross_entropy(high.flatten(0, -2), targets, ignore_index=IGNORED, reduction="sum")


def mean_loss(
    total: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """A summed loss over the number of its targets, or over that of the whole step.

    Args:
        total: summed.
        targets: of the call.
        labels: of the call, unshifted.
        num_items_in_batch: labels of the whole step, as Trainer counts them.
    """
    count = (targets != IGNORED).sum()
    if num_items_in_batch is not None:
        surplus = (labels[:, 1:] != IGNORED).sum() - count
        count = _without_surplus(torch.as_tensor(num_items_in_batch).to(count.device), count, surplus)
    # Where there is nothing to predict the loss is 0, not 0 / 0.
    return total / count.to(total.device).clamp(min=1)


def _without_surplus(given: torch.Tensor, count: torch.Tensor, surplus: torch.Tensor) -> torch.Tensor:
    """Estimate how many targets a step has, of which Trainer says that it has `given`.

    Args:
        given: labels of the whole step, with those that nothing predicts.
        count: targets of this call.
        surplus: labels of this call that Trainer counted and nothing predicts.
    """
    if not count or not surplus:
        return given
    if bool((given == count + surplus).all()):
        return count
    logger.warning_once(
        "num_items_in_batch counts labels that nothing predicts, those of the first token of rows that are padded on "
        "the left, and how many there are in the step's other batches cannot be known here: their share is taken for "
        "this one's, and where it differs the loss is a little off. To be exact pad on the right "
        "(tokenizer.padding_side = 'right'), or use hf_sleep.training.SleepCollator or SleepTrainer"
    )
    return given * (count / (count + surplus))
