"""Find out whether the plain adapter computes what a base of an unlisted family computes, bit for bit.

The base runs as it is and shows what goes in and out of its layers; the adapter runs the same layers one by one.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

from ..registry import BASES
from .comparison import STEPS, Comparison
from .decoder import Decoder, decoder_for, what_an_adapter_needs
from .miniature import miniature

LENGTHS = (1, 6, 65)
COPY_LENGTHS = (1, 6, 23, 201)
FAR = 1 << 20
"""The largest position tried, of a base that addresses more."""


@dataclass(frozen=True)
class Probe:
    """A family that is not listed, and what of it was found to be what the plain adapter computes. JSON-ready.

    Args:
        model_type: of the base.
        model_class: the base's class, with its module.
        transformers_version: whose masks and layers ran.
        dtype: of the weights.
        device: where they were.
        attn_implementation: how attention was computed.
        lengths: tokens that were read at once, with the base's own weights.
        covered: one sentence for each thing that was equal bit for bit.
        not_covered: one sentence for each thing that was left open.
    """

    model_type: str
    model_class: str
    transformers_version: str
    dtype: str
    device: str
    attn_implementation: str
    lengths: list[int]
    covered: list[str]
    not_covered: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)


def require_probed(model_type: str, probed: dict[str, Any] | None) -> None:
    """Raise `ValueError` for a family that is neither listed nor, by its report, probed."""
    if probed is None and model_type not in BASES:
        raise ValueError(
            f"model_type={model_type!r} is not listed, and SleepLMConfig.probed holds no report of it: retrofit a base "
            "with AutoModelForSleepLM.from_pretrained or SleepForCausalLM.from_base, which compare it with the plain "
            f"adapter. {what_an_adapter_needs(model_type)}"
        )


@torch.no_grad()
def probe(lm: PreTrainedModel) -> Probe:
    """Compare the plain adapter with a base of an unlisted family, or the adapter that is registered for it.

    Both read random tokens: several lengths at once, after a prefill through a cache, at far positions, and as a batch
    with pads. Every stage must be equal bit for bit, in the base's dtype and on its device. Cached keys are shifted
    with `Decoder.shift_keys` and compared with RoPE at the other positions, in every layer. The same is done in a small
    random copy of the base's class, in which all that its config calls a window is short enough to be read past.

    Args:
        lm: a causal LM without linear-recurrent layers of its own. It is left as it was.

    Raises:
        ValueError: where the two first differ, by how much, and what an adapter needs.
    """
    decoder = decoder_for(lm)
    flash = decoder.attention_implementation not in ("sdpa", "eager")
    with _evaluating(lm):
        covered, lengths = _compare_all(lm, decoder, LENGTHS, "")
    open_questions = []
    if (rope := (getattr(lm.config, "rope_parameters", None) or {}).get("rope_type")) in ("dynamic", "longrope"):
        open_questions.append(f"keys shifted from where RoPE has other frequencies (rope_type={rope!r})")
    if flash:
        open_questions.append(f"pads and windows with attn_implementation={decoder.attention_implementation!r}")
    small, changed = miniature(lm, decoder.layer_kinds)
    if small is not None:
        with _evaluating(small):
            more, read = _compare_all(small, decoder_for(small), COPY_LENGTHS, f"random copy ({changed}): ")
        covered += more
        open_questions.append(f"windows of more than {max(read)} tokens that no field of the config names")
    else:
        open_questions.append(f"windows of more than {max(lengths)} tokens: no small copy could be made ({changed})")
    return Probe(
        model_type=lm.config.model_type,
        model_class=f"{type(lm).__module__}.{type(lm).__qualname__}",
        transformers_version=transformers.__version__,
        dtype=str(lm.dtype).removeprefix("torch."),
        device=lm.device.type,
        attn_implementation=decoder.attention_implementation,
        lengths=list(lengths),
        covered=covered,
        not_covered=open_questions,
    )


def _compare_all(
    lm: PreTrainedModel, decoder: Decoder, lengths: tuple[int, ...], where: str
) -> tuple[list[str], tuple[int, ...]]:
    """Compare in every way; what was covered, in sentences that begin with `where`, and the lengths."""
    most = getattr(lm.config, "max_position_embeddings", None) or FAR
    windows = sorted({window for kind in decoder.kinds if (window := decoder.own_window(kind)) is not None})
    lengths = tuple(n for n in lengths if n <= most)
    short = [window for window in windows if 2 * window < max(lengths)]
    flash = decoder.attention_implementation not in ("sdpa", "eager")
    generator = torch.Generator().manual_seed(0)

    def tokens(rows: int, count: int) -> torch.Tensor:
        return torch.randint(1, lm.config.vocab_size, (rows, count), generator=generator).to(lm.device)

    comparison = Comparison(lm, decoder, where)
    covered = [f"{where}{', '.join(map(str, lengths))} tokens at once"]
    for length in lengths:
        comparison.read(f"{length} tokens", tokens(1, length))
    far = min(most, FAR) - 6
    if far > 0:
        comparison.read(f"positions from {far}", tokens(1, 6), first=far)
        covered.append(f"{where}positions from {far} to {far + 5}")
    prefills = [6, *(window - 2 for window in short if window > 2)]
    for prefill in prefills:
        past_window = any(prefill + sum(STEPS) > window for window in windows)
        # A cache with the config's windows drops what they no longer reach; the adapter masks it.
        cache = DynamicCache() if past_window else DynamicCache(config=lm.config)
        comparison.decode(tokens(1, prefill + sum(STEPS)), prefill, cache)
        steps = " + ".join(map(str, STEPS))
        covered.append(f"{where}{steps} tokens after a prefill of {prefill}, through a cache")
    if not flash:
        width = max((length for length in lengths if length < 30), default=1)
        counts = [width, max(1, width // 2), 1]
        comparison.read("a batch with pads", tokens(3, width), counts=counts)
        covered.append(f"{where}a batch with pads: rows of {', '.join(map(str, counts))} tokens")
    covered += [f"{where}both sides of an attention window of {window} tokens" for window in short]
    comparison.shift(tokens(1, 6))
    covered.append(f"{where}keys shifted by 9 positions back and 5 on, in all {len(decoder.kinds)} layers")
    return covered, lengths


@contextmanager
def _evaluating(lm: PreTrainedModel) -> Iterator[None]:
    """Switch dropout and checkpointing off; each module is afterwards in the mode that it was in."""
    modes = {module: module.training for module in lm.modules()}
    lm.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
