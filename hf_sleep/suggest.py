"""Where to loop: measure a base on a little text, without training, and choose its loop and blocks together."""

import dataclasses
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, PreTrainedModel

from .bases.decoder import Decoder, decoder_for, period_of
from .config import SleepConfig
from .engine.slots import Norm, RunningOrder, running_order
from .engine.window import Window
from .memory import Counters
from .modeling import SleepForCausalLM

MAX_LOSS = 0.25
"""What a second run of the chosen range may cost, in nats per token."""

SINK = 10.0
"""A first token is a sink where its norm is at least so many times the median token's."""

SINK_STEP = 2.0
"""A sink is born or dies in a layer that makes its norm over the median token's so many times larger or smaller."""

FLAT = 1.2
"""A layer belongs to the flat middle where its angular distance is at most so many times the median layer's."""

MAX_TOKENS = 256
"""Tokens of the text that are read."""

TEXT = """\
The lighthouse at the end of the pier had not been lit for thirty years when Marta bought it. The town had offered it \
for the price of its bricks, and nobody else had come to the auction. She moved in at the end of April with two \
suitcases, a dog called Brandt and a box of tools that had been her father's. The stairs were sound. The lamp room was \
not: three of its panes were gone, and gulls had nested in the lens.

She began with the windows. A glazier from the next village measured the frames and said that glass of this curve had \
to be ordered from abroad, which would take until June. So she covered the gaps with canvas and turned to the walls. \
Under four coats of paint she found a row of pencil marks beside the door, each with a name and a year. The lowest was \
no higher than her knee. The keepers had measured their children there, from 1891 to 1954, and the last of the names \
was her own grandmother's.

How does a lamp of this kind work? A small flame stands in the middle of a large lens. The lens is made of rings of \
glass, each cut so that it bends the light a little more than the ring inside it, and all of it leaves in one flat \
beam. If the lens turns once in twenty seconds and has four faces, a ship sees a flash every five seconds. No two \
lights on a coast have the same rhythm, so a captain who counts the seconds knows where he is.

In September the last pane was set. She cleaned the lens with vinegar and soft paper, ring by ring, and oiled the \
bearing. Then she wound the weight up to the top of the tower, as the keepers had done every evening, and let go of \
the brake. Slowly, without a sound, the lens began to turn.
"""
"""The text that is read where no other is given."""


@dataclass(frozen=True)
class LayerRow:
    """One decoder layer.

    Args:
        index: its place.
        kind: the adapter's name for its kind.
        angle: angular distance between what enters and what leaves it, arccos of their cosine over pi, of the median
            token.
        norm: norm of what leaves it, of the median token.
        first_norm: the same of the first token.
        sink: `"born"` or `"dies"` where the attention sink does; else `""`.
        is_flat: whether it belongs to the flat middle.
    """

    index: int
    kind: str
    angle: float
    norm: float
    first_norm: float
    sink: str
    is_flat: bool


@dataclass(frozen=True)
class CandidateRow:
    """One range of layers that was run twice.

    Args:
        loop_layers: the range, half-open.
        loss: next-token loss over that of one pass, in nats per token.
        holds_sink_change: whether the attention sink is born or dies in it.
        is_chosen: whether it is the one that is suggested.
    """

    loop_layers: tuple[int, int]
    loss: float
    holds_sink_change: bool
    is_chosen: bool


@dataclass(frozen=True)
class LoopSuggestion:
    """What was measured, and what follows from it.

    Args:
        name: where the model came from, or `""`.
        tokens: how many were read.
        loss: next-token loss of one pass, in nats per token.
        period: layers in the repeating unit of the layer pattern.
        layers: a row for each decoder layer.
        candidates: a row for each range that was run twice, the longest first.
        config: settings with `loop_layers` and, where the base gets blocks, `block_layers` for that loop.
    """

    name: str
    tokens: int
    loss: float
    period: int
    layers: tuple[LayerRow, ...]
    candidates: tuple[CandidateRow, ...]
    config: SleepConfig

    def to_dict(self) -> dict[str, Any]:
        """Make a JSON-ready dictionary."""
        rows = {name: [dataclasses.asdict(row) for row in getattr(self, name)] for name in ("layers", "candidates")}
        for row in rows["candidates"]:
            row["loop_layers"] = list(row["loop_layers"])
        plain = {name: getattr(self, name) for name in ("name", "tokens", "loss", "period")}
        return {**plain, **rows, "config": self.config.to_dict()}

    def plot(self, file: str | Path) -> None:
        """Draw angles, norms and candidates over the layers, into a file that matplotlib can write.

        Raises:
            ImportError: without matplotlib.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 7), constrained_layout=True)
        angles, norms, ranges = figure.subplots(3, 1, sharex=True)
        at = [row.index for row in self.layers]
        loop_layers = self.config.loop_layers or (0, len(at))
        for axes in (angles, norms, ranges):
            axes.axvspan(loop_layers[0] - 0.5, loop_layers[1] - 0.5, color="tab:green", alpha=0.12, lw=0)
        colours = ["tab:blue" if row.is_flat else "lightsteelblue" for row in self.layers]
        angles.bar(at, [row.angle for row in self.layers], color=colours)
        angles.set(ylabel="angular distance", title=f"{Path(self.name).name or 'model'}: loop {loop_layers}")
        norms.plot(at, [row.first_norm for row in self.layers], "o-", ms=3, color="tab:red", label="first token")
        norms.plot(at, [row.norm for row in self.layers], "o-", ms=3, color="tab:blue", label="median token")
        norms.set(ylabel="norm after the layer", yscale="log")
        for row in self.layers:
            if row.sink:
                norms.axvline(row.index, color="gray", ls=":", lw=1)
                norms.text(row.index + 0.1, row.norm / 2, row.sink, fontsize=8)
        norms.legend(loc="best", fontsize=8)
        for y, candidate in enumerate(reversed(self.candidates)):
            first, end = candidate.loop_layers
            colour = "tab:green" if candidate.is_chosen else "silver"
            ranges.barh(y, end - first, left=first - 0.5, height=0.7, color=colour)
            ranges.text(end - 0.3, y, f"{candidate.loss:+.2f}", va="center", fontsize=8)
        ranges.set(xlabel="layer", ylabel="run twice: nats", yticks=[], xlim=(-1, len(at) + 2))
        figure.savefig(file, dpi=110)


def remark(row: CandidateRow) -> str:
    """Say in words what stands out in a candidate."""
    words = ["suggested"] * row.is_chosen + ["the sink is born or dies in it"] * row.holds_sink_change
    return "; ".join(words)


@torch.no_grad()
def suggest_loop(
    model: PreTrainedModel, tokenizer: Any = None, text: str | torch.Tensor | None = None
) -> LoopSuggestion:
    """Measure where a model can run layers again, and choose loop and blocks together. Seconds; nothing is trained.

    Of the candidates whose second run costs at most `MAX_LOSS` nats per token the longest is chosen, of equally long
    ones the cheapest. Ranges in which the attention sink is born or dies are passed over, but for all layers. Where
    nothing is cheap enough, the cheapest range is chosen that is not passed over.

    Every run of a range reads the text from its start, with empty fast weights: those of the run before know what comes
    next. The candidates are all layers, the family's default, the middle half and third, and each stretch of the flat
    middle in which no sink is born or dies, whole and with a quarter left out at either end or both; in whole periods
    of the layer pattern.

    Args:
        model: a base causal LM, or a `SleepForCausalLM`, whose blocks run with it. It is left as it was.
        tokenizer: of the model; by default it is loaded from where the model came from. Token ids need none.
        text: a string, or token ids `[T]`; by default `TEXT`. No more than `MAX_TOKENS` tokens are read.

    Returns:
        What was measured, with `config`: pass it as `sleep=` to a retrofit of the base. Of a `SleepForCausalLM`, its
        own settings with the other loop.

    Raises:
        ValueError: a text of fewer than 3 tokens, no tokenizer, or an unknown family.
    """
    sleeps = isinstance(model, SleepForCausalLM)
    lm: Any = model.lm if sleeps else model
    decoder, blocks = decoder_for(lm), dict(model.fast_weights.items()) if sleeps else {}
    ids = _token_ids(lm, tokenizer, text)
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        measured = _Measured(decoder, running_order(decoder, blocks, (0, len(decoder.kinds))), ids)
        layers = measured.layers()
        ranges = _candidates(layers, decoder)
        losses = {loop: measured.loss_twice(*loop) - measured.loss for loop in ranges}
    finally:
        for module, mode in was_training.items():
            module.training = mode
    changes = {row.index for row in layers if row.sink}
    holding = {loop: not changes.isdisjoint(range(*loop)) for loop in ranges}
    chosen = _choice(losses, holding, len(layers))
    rows = (CandidateRow(loop, losses[loop], holding[loop], loop == chosen) for loop in ranges)
    return LoopSuggestion(
        name=lm.name_or_path,
        tokens=ids.shape[1],
        loss=measured.loss,
        period=period_of(decoder.kinds),
        layers=tuple(layers),
        candidates=tuple(rows),
        config=_settings(model, chosen),
    )


def _token_ids(lm: PreTrainedModel, tokenizer: Any, text: str | torch.Tensor | None) -> torch.Tensor:
    """Token ids `[1, T]` on the embedding's device."""
    if isinstance(text, torch.Tensor):
        ids = text.reshape(1, -1)
    else:
        if tokenizer is None and not lm.name_or_path:
            raise ValueError("suggest_loop: the model does not say where it came from: pass its tokenizer")
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(lm.name_or_path)
        ids = tokenizer(TEXT if text is None else text, return_tensors="pt").input_ids
    most = min(MAX_TOKENS, getattr(lm.config, "max_position_embeddings", None) or MAX_TOKENS)
    if ids.shape[1] < 3:
        raise ValueError(f"suggest_loop: text has {ids.shape[1]} tokens, and at least 3 are needed")
    embedding: Any = lm.get_input_embeddings()
    return ids[:, :most].to(embedding.weight.device)


class _Measured:
    """One pass of a model over a text, and second passes over ranges of its layers.

    Args:
        decoder: of the base.
        order: its layers and blocks.
        ids: `[1, T]`.
    """

    def __init__(self, decoder: Decoder, order: RunningOrder, ids: torch.Tensor):
        self.decoder, self.ids, self.depth = decoder, ids, len(decoder.kinds)
        layers = [slot for slot in order.slots if not isinstance(slot, Norm)]
        self.slots = [[slot for slot in layers if slot.index == index] for index in range(self.depth)]
        x = decoder.embed(ids)
        eviction = SleepConfig(window_size=ids.shape[1]).make_eviction()
        self.window = Window.of_new(decoder, eviction, x, (Counters(),), [ids.shape[1]])
        self.hidden = [x]
        for index in range(self.depth):
            self.hidden.append(self._run_layer(index, self.hidden[-1]))
        self.loss = self._loss(self._closed(self.hidden[-1], self.depth))

    def _run_layer(self, index: int, x: torch.Tensor) -> torch.Tensor:
        for slot in self.slots[index]:
            x, _ = slot.run(x, slot.empty(1, x.dtype), self.window)
        return x

    def _closed(self, x: torch.Tensor, end: int) -> torch.Tensor:
        """What a pass that ends before layer `end` hands on: normed where the base's passes are."""
        return self.decoder.norm(x) if self.decoder.norm_every_pass and end == self.depth else x

    def _loss(self, x: torch.Tensor) -> float:
        logits = self.decoder.logits(x)[0, :-1].float()
        return F.cross_entropy(logits, self.ids[0, 1:].to(logits.device)).item()

    def loss_twice(self, first: int, end: int) -> float:
        """Next-token loss, in nats per token, where layers `first` to `end - 1` run twice."""
        x = self._closed(self.hidden[end], end)
        for index in range(first, end):
            x = self._run_layer(index, x)
        x = self._closed(x, end)
        for index in range(end, self.depth):
            x = self._run_layer(index, x)
        return self._loss(x if end == self.depth else self._closed(x, self.depth))

    def layers(self) -> list[LayerRow]:
        """A row for each layer."""
        states = [x[0].float().cpu() for x in self.hidden]
        norms = [x.norm(dim=-1) for x in states]
        cosines = [F.cosine_similarity(a, b, dim=-1).clamp(-1, 1) for a, b in pairwise(states)]
        angles = [(cosine.arccos() / torch.pi).median().item() for cosine in cosines]
        shares = [(norm[0] / norm.median()).item() for norm in norms]
        limit = FLAT * torch.tensor(angles).median().item()
        return [
            LayerRow(
                index=i,
                kind=kind,
                angle=angles[i],
                norm=norms[i + 1].median().item(),
                first_norm=norms[i + 1][0].item(),
                sink=_sink_change(shares[i], shares[i + 1]),
                is_flat=angles[i] <= limit,
            )
            for i, kind in enumerate(self.decoder.kinds)
        ]


def _sink_change(before: float, after: float) -> str:
    """Say what a layer does to the sink, of the first token's norm over the median token's before and after it."""
    if max(before, after) < SINK:
        return ""
    if after >= SINK_STEP * before:
        return "born"
    return "dies" if before >= SINK_STEP * after else ""


def _candidates(layers: list[LayerRow], decoder: Decoder) -> list[tuple[int, int]]:
    """Ranges to run twice, the longest first."""
    depth, period = len(layers), period_of(decoder.kinds)
    ranges = {(0, depth), decoder.default_loop_layers(decoder.config)}
    middles = [(depth // 4, depth - depth // 4), (depth // 3, depth - depth // 3)]
    for is_calm, run in groupby(layers, key=lambda row: row.is_flat and not row.sink):
        if is_calm:
            first, *_, last = (row.index for row in [*run] * 2)
            quarter = (last + 1 - first) // 4
            middles += [(first + a * quarter, last + 1 - b * quarter) for a in (0, 1) for b in (0, 1)]
    for first, end in middles:
        first, end = -(-first // period) * period, end // period * period
        if first < end:
            ranges.add((first, end))
    return sorted(ranges, key=lambda loop: (loop[0] - loop[1], loop))


def _choice(losses: dict[tuple[int, int], float], holding: dict[tuple[int, int], bool], depth: int) -> tuple[int, int]:
    """Choose a range, as `suggest_loop` says."""
    whole = (0, depth)
    calm = [loop for loop in losses if loop == whole or not holding[loop]]
    cheap = [loop for loop in calm if losses[loop] <= MAX_LOSS]
    if cheap:
        return max(cheap, key=lambda loop: (loop[1] - loop[0], -losses[loop]))
    return min(calm, key=lambda loop: losses[loop])


def _settings(model: Any, loop_layers: tuple[int, int]) -> SleepConfig:
    """Settings with this loop, and with blocks for it where the model has none yet."""
    if isinstance(model, SleepForCausalLM):
        return dataclasses.replace(model.config.sleep, loop_layers=loop_layers)
    placed = SleepConfig(window_size=2, loop_layers=loop_layers).resolve(model.config)
    return SleepConfig(loop_layers=loop_layers, block_layers=placed.block_layers)
