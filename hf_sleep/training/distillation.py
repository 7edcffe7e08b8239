"""Distillation: a model that sleeps learns from its own base, which has read the same text with its full cache."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..bases.decoder import decoder_for
from ..checks import require_int
from ..engine import FixedPasses, Hard, Nothing, Watchers, running_order
from ..labels import IGNORED, next_labels
from ..lora import without_wrapper
from ..modeling.inputs import Layout
from ..modeling.outputs import TokenLoss
from ..sleep import Sleeper
from .parameters import refuse_sharded
from .trainer import SleepTrainer

LEAVES_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""PEFT's first values of an adapter, by name, that leave the base's weights alone."""


@dataclass(frozen=True)
class Distillation:
    """Settings of a loss that is (1 - `share`) times cross-entropy and `share` times KL(teacher || student).

    Args:
        share: of the divergence, from 0 (no teacher reads) to 1.
        top_k: tokens of the teacher's distribution that are told apart; the others count as one. 0: all.
        recurring_weight: of a token that ends a span which stood in the text before, the last time more than a window
            ago, so that its KV is gone; 1: no token weighs more. Weights have a mean of 1 over the targets of a row.
        recurring_tokens: length of such a span.
        chunk_tokens: tokens of which the teacher's logits are made at a time.

    Raises:
        ValueError: naming the field.

    Source: Hinton et al. 2015 (arXiv 1503.02531) for the loss; the weights are ours.
    """

    share: float = 0.5
    top_k: int = 32
    recurring_weight: float = 1.0
    recurring_tokens: int = 4
    chunk_tokens: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"Distillation.share={self.share!r} must be a share of the loss, from 0 to 1")
        if not (math.isfinite(self.recurring_weight) and self.recurring_weight > 0):
            raise ValueError(f"Distillation.recurring_weight={self.recurring_weight!r} must be finite and above 0")
        for name, least in (("top_k", 0), ("recurring_tokens", 1), ("chunk_tokens", 1)):
            require_int(f"Distillation.{name}", getattr(self, name), least)


@dataclass(frozen=True)
class Said:
    """Distributions of a teacher at some places of a batch.

    Args:
        index: `[B, T]` int64, which of the n each column has; anything where it has none.
        ids: `[n, k]` int64, the likeliest tokens.
        log_p: `[n, k]`, of these, in float32 at least.
        log_rest: `[n]`, of all other tokens together.
    """

    index: torch.Tensor
    ids: torch.Tensor
    log_p: torch.Tensor
    log_rest: torch.Tensor

    def divergence(
        self, logits: torch.Tensor, log_z: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """KL(teacher || student) over the teacher's likeliest tokens and the rest, in nats, `[m]`.

        Args:
            logits: `[m, vocab]`, the student's.
            log_z: `[m]`, their log-sum-exp.
            rows: `[m]`, of the batch.
            columns: `[m]`, where the teacher said something.
        """
        at = self.index[rows, columns]
        theirs, theirs_rest = self.log_p[at], self.log_rest[at]
        ours = logits.gather(-1, self.ids[at]) - log_z[:, None]
        of_likely = (theirs.exp() * (theirs - ours)).sum(-1)
        return of_likely + theirs_rest.exp() * (theirs_rest - log_rest(ours))


def log_rest(log_p: torch.Tensor) -> torch.Tensor:
    """Log-probability `[n]` of all tokens but those of `log_p` `[n, k]`; what rounding hides counts as epsilon."""
    rest = -torch.expm1(log_p.logsumexp(-1))
    return rest.clamp(min=torch.finfo(log_p.dtype).eps).log()


class Teacher:
    """The base of a sleeping model, which reads whole rows with its full cache, without blocks, sleep and gradient.

    An adapter is switched off while it reads. Of a base that is trained itself a frozen copy reads, as the base is when
    the teacher is made.

    Args:
        model: a `SleepForCausalLM`, or one that PEFT has wrapped.
        top_k: tokens that are told apart; 0: all.
        chunk_tokens: tokens of which logits are made at a time.
        copied: read with a copy even if the base stays as it is: where it will be sharded over ranks. By default where
            a parameter of the base is trained.

    Raises:
        ValueError: a base that is sharded already, one that an adapter's first values have changed, or a copy of one
            that has an adapter.
    """

    def __init__(self, model: Any, top_k: int = 32, chunk_tokens: int = 512, copied: bool | None = None):
        refuse_sharded(model, "Teacher", "Make it before the model is sharded, with copied=True")
        self.top_k, self.chunk_tokens = top_k, chunk_tokens
        self._wrapper = model if hasattr(model, "peft_config") else None
        refuse_changed_base(model)
        self.lm: Any = without_wrapper(model).lm
        with self._alone():
            trained = any(parameter.requires_grad for parameter in self.lm.parameters())
        self.is_copy = trained if copied is None else copied
        if self.is_copy and self._wrapper is not None:
            raise ValueError(
                "Teacher: an adapter lies in the base's layers, and a copy of the base would keep it. "
                "Train the adapter without FSDP, and nothing of the base itself; or leave the adapter out"
            )
        if self.is_copy:
            self.lm = copy.deepcopy(self.lm).requires_grad_(False)

    @torch.no_grad()
    def read(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, wanted: torch.Tensor) -> Said:
        """Read rows, each on its own.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, 0 at pads, which may stand at either end; `None`: no pads.
            wanted: `[B, T]`, columns at which to say what comes next.

        Raises:
            ValueError: rows longer than the base has positions for.
        """
        most = getattr(self.lm.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and input_ids.shape[1] > most:
            raise ValueError(
                f"Teacher: rows have {input_ids.shape[1]} columns, and the base has {most} positions to read them with "
                "its full context: give shorter rows, or do without a teacher"
            )
        layout = Layout.of_all(*input_ids.shape) if attention_mask is None else Layout.of_mask(attention_mask)
        rows, columns = (index.to(input_ids.device) for index in wanted.nonzero(as_tuple=True))
        places = columns - torch.tensor(layout.start, device=input_ids.device)[rows]
        with self._alone():
            hidden = self._hidden(layout.compact(input_ids), layout.counts)
            chunks = zip(rows.split(self.chunk_tokens), places.split(self.chunk_tokens), strict=True)
            said = [self._say(hidden[r, p]) for r, p in chunks]
        index = torch.zeros(input_ids.shape, dtype=torch.long, device=input_ids.device)
        index[rows, columns] = torch.arange(len(rows), device=index.device)
        return Said(index, *(torch.cat(parts) for parts in zip(*said, strict=True)))

    def _hidden(self, ids: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """What the head takes, `[B, T, C]`, of left-aligned rows; anything at pads."""
        decoder = decoder_for(self.lm)
        if decoder.base_loops > 1:
            # Its own forward knows how often its layers run.
            return self.lm.model(input_ids=ids, use_cache=False).last_hidden_state
        order = running_order(decoder, {}, (0, len(decoder.kinds)))
        x = decoder.embed(ids)
        sleeper = Sleeper(decoder, order, Hard(ids.shape[1]), Nothing(x.shape[-1]), Watchers())
        _, (read,) = sleeper.read(sleeper.empty(len(x), x.dtype), x, counts, FixedPasses(1))
        assert read.hidden is not None
        hidden = read.hidden.new_zeros(x.shape)
        hidden[read.span.rows, : read.hidden.shape[1]] = read.hidden
        return hidden

    def _say(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, log-probabilities and the rest's, of `[n, C]`."""
        logits = decoder_for(self.lm).logits(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        likely, ids = logits.topk(min(self.top_k or logits.shape[-1], logits.shape[-1]), -1)
        log_p = likely - logits.logsumexp(-1, keepdim=True)
        return ids, log_p, log_rest(log_p)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The base as it was before training: without an adapter, and without dropout."""
        off: AbstractContextManager = nullcontext() if self._wrapper is None else without_adapter(self._wrapper)
        modes = [(module, module.training) for module in self.lm.modules()]
        with off:
            self.lm.eval()
            try:
                yield
            finally:
                for module, mode in modes:
                    module.training = mode


def refuse_changed_base(model: Any) -> None:
    """Raise `ValueError` where an adapter's first values were taken out of the base's weights."""
    for config in (getattr(model, "peft_config", None) or {}).values():
        how, said = getattr(config, "init_lora_weights", True), None
        if isinstance(how, str) and how.lower() not in LEAVES_THE_BASE:
            said = f"init_lora_weights={how!r}"
        if getattr(config, "kasa_config", None) is not None:
            said = "kasa_config"
        if said:
            raise ValueError(
                f"Teacher: {said} changes the base's own weights, and without the adapter they are not what it was: "
                "use init_lora_weights=True without it, or do without a teacher"
            )


@contextmanager
def without_adapter(wrapper: Any) -> Iterator[None]:
    """Switch a `PeftModel`'s adapter off while it is open. What was frozen is frozen after it.

    PEFT itself would train every parameter of an adapter that it switches on again.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in wrapper.parameters()]
    try:
        with wrapper.disable_adapter():
            yield
    finally:
        for parameter, is_trained in trained:
            parameter.requires_grad_(is_trained)


class DistillationTrainer(SleepTrainer):
    """`SleepTrainer` whose loss in training is a `Distillation`; evaluation is next-token cross-entropy as ever.

    The teacher reads every batch as the student does, after `WindowsCurriculum` has cut it, and says something at each
    target. Rows that begin with other rows' fast weights (`pass_states`) begin with nothing for the teacher. Beside the
    loss it logs what that is made of, without weights: `cross_entropy` and, with a teacher, `divergence`, in nats per
    target, the means over all that was read since the last log.

    Args:
        distillation: the loss.
        teacher: who is learnt from; by default the model's own base, as it is now.

    Raises:
        ValueError: `label_smoothing_factor` or `compute_loss_func`, which make a loss of their own.
    """

    def __init__(self, *args: Any, distillation: Distillation | None = None, teacher: Teacher | None = None, **kw: Any):
        super().__init__(*args, **kw)
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.args.label_smoothing_factor}: the teacher's distribution is what "
                "smooths. Set it to 0"
            )
        if self.compute_loss_func is not None:
            raise ValueError(
                "DistillationTrainer with a compute_loss_func: the loss is made of cross-entropy and the teacher's. "
                "Leave it out, or use SleepTrainer"
            )
        self.distillation = distillation or Distillation()
        if teacher is None and self.distillation.share:
            settings = self.distillation.top_k, self.distillation.chunk_tokens
            teacher = Teacher(self.model, *settings, copied=True if self.is_fsdp_enabled else None)
        self.teacher = teacher
        self._sums = torch.zeros(3, device=self.args.device)
        if teacher is not None and teacher.is_copy:
            teacher.lm.to(self.args.device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if model.training:
            inputs = {**inputs, "token_loss": self.token_loss(inputs)}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def token_loss(self, batch: Mapping[str, torch.Tensor]) -> TokenLoss:
        """Let the teacher read a batch with `input_ids` and `labels`, and make the loss of its targets."""
        if missing := [name for name in ("input_ids", "labels") if batch.get(name) is None]:
            raise ValueError(
                f"a batch has {sorted(batch)}, and no {' and no '.join(missing)}: the teacher reads input_ids, and "
                "says something where labels are. Let the collator give both"
            )
        ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
        targets = next_labels(labels, None if mask is None else mask != 0) != IGNORED
        share, weights = self.distillation.share, self._weights(ids, mask, targets)
        said = None
        if share and self.teacher is not None and bool(targets.any()):
            with self.accelerator.autocast():
                said = self.teacher.read(ids, mask, targets)

        def loss(
            logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
        ) -> torch.Tensor:
            log_z = logits.logsumexp(-1)
            entropy = log_z - logits.gather(-1, targets[:, None])[:, 0]
            apart = torch.zeros_like(entropy)
            if said is not None:
                apart = said.divergence(logits, log_z, rows, columns)
            # With checkpointing every window counts twice, so their means are the same.
            parts = entropy.detach(), apart.detach(), torch.ones_like(entropy)
            self._sums = self._sums + torch.stack(parts).sum(1).float().to(self.args.device)
            each = (1 - share) * entropy + share * apart
            return (each if weights is None else weights[rows, columns] * each).sum()

        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = {**logs, **self._means()}
        super().log(logs, *args, **kwargs)

    def _means(self) -> dict[str, float]:
        """What the loss was made of since this was last asked, over all ranks."""
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        entropy, apart, count = self.accelerator.reduce(sums, "sum").tolist()
        if not count:
            return {}
        means = {"cross_entropy": entropy / count, "divergence": apart / count}
        return means if self.distillation.share else {"cross_entropy": means["cross_entropy"]}

    def _weights(self, ids: torch.Tensor, mask: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor | None:
        """Weights `[B, T]`, each at the column that predicts the token; `None` where all are 1."""
        more, size = self.distillation.recurring_weight, self.model.config.sleep.window_size
        if more == 1:
            return None
        real = torch.ones_like(ids) if mask is None else mask
        weights = torch.ones(ids.shape, dtype=torch.float32)
        for b, row in enumerate(real.cpu() != 0):
            again = recurring(ids[b].cpu()[row].tolist(), self.distillation.recurring_tokens, size)
            weights[b, row] += (more - 1) * torch.tensor(again, dtype=torch.float32)
        # A column's logits are about the next one's token.
        weights = weights.roll(-1, 1).to(ids.device).masked_fill(~targets, 0)
        return weights * (targets.sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1e-6))


def recurring(ids: Sequence[int], length: int, distance: int) -> list[bool]:
    """Tell of each token whether the `length` tokens that it ends stood before, the last time over `distance` ago.

    Args:
        ids: of a row's tokens.
        length: of a span, in tokens.
        distance: in tokens, between the ends of the two.
    """
    last: dict[tuple[int, ...], int] = {}
    found = []
    for i in range(len(ids)):
        span = tuple(ids[max(0, i + 1 - length) : i + 1])
        found.append(len(span) == length and span in last and i - last[span] > distance)
        last[span] = i
    return found
