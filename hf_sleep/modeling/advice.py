"""Warnings that a user gets once: of a model that would forget, cannot learn, or is slow for no reason."""

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..config import SleepConfig
from ..dtypes import emulated_dtype_of
from ..engine import PassPolicy
from ..memory import Memory
from ..placement import is_known_zero
from .inputs import Layout

logger = logging.get_logger(__name__)


class Advice:
    """Warnings of one model, each given once.

    Args:
        is_fresh: whether the model was made from a base, and not loaded.
    """

    def __init__(self, is_fresh: bool):
        self.is_fresh = is_fresh
        self.may_be_untrained = self.may_be_stuck = True

    def before_reading(
        self, model: Any, memory: Memory, layout: Layout, policy: PassPolicy, looks_at_weights: bool
    ) -> None:
        """Warn of what is about to be read.

        Args:
            model: a `SleepForCausalLM`.
            memory: what it has read.
            layout: of what it reads next.
            policy: of the call.
            looks_at_weights: whether all weights are here to be looked at.
        """
        size = model.config.sleep.window_size
        if model.training:
            self.is_fresh = False
            if getattr(model.config.text_config, "output_router_logits", False):
                logger.warning_once(
                    "text_config.output_router_logits=True asks for a loss that keeps the experts balanced, and a "
                    "model that sleeps has none: it learns next tokens alone. Freeze the routers, or set it to False"
                )
        if not any(row.fill + n > size for row, n in zip(memory.counters, layout.counts, strict=True)):
            return
        if not model.training and looks_at_weights:
            self._of_untrained(model.fast_weights, model.config.sleep, policy)
        if model.training and torch.is_grad_enabled():
            self._of_stuck(model)

    def _of_untrained(self, blocks: Any, sleep: SleepConfig, policy: PassPolicy) -> None:
        """Warn when an untrained model is about to sleep."""
        if not self.may_be_untrained:
            return
        self.may_be_untrained = False
        if blocks and not all(block.is_untrained for block in blocks.values()):
            return
        if blocks:
            what = (
                "fast-weight blocks that were never trained: they add nothing, so what leaves the window is forgotten."
            )
        elif self.is_fresh:
            what = "a sleep that it was never trained for: what leaves the window is mostly forgotten."
        else:
            return
        advice = " Train it through sleep first; until then, sleep only bounds memory."
        if sleep.eviction == "sliding" and policy.at_most != 1 and sleep.between == "none":
            advice += (
                " Until then slide with sleep_passes=1 or between='gate', too: KV of a second pass over what the first "
                "wrote is noise to it."
            )
        logger.warning_once(f"This model was given {what}{advice}")

    def _of_stuck(self, model: nn.Module) -> None:
        """Warn when training is about to sleep with blocks whose output projection is zero and stays so."""
        if not self.may_be_stuck:
            return
        self.may_be_stuck = False
        outputs: dict[str, list[torch.Tensor]] = {}
        blocks: Any = model.fast_weights
        for name, parameter in blocks.named_parameters():
            if ".o_proj." in name:  # an adapter's, too
                outputs.setdefault(name.partition(".")[0], []).append(parameter)
        stuck = [b for b, ps in outputs.items() if not any(p.requires_grad or not is_known_zero(p) for p in ps)]
        if stuck and any(parameter.requires_grad for parameter in model.parameters()):
            logger.warning_once(
                f"The fast-weight blocks {', '.join(stuck)} cannot learn: their output projections are zero and "
                "frozen, so they add nothing, and no gradient passes them. Train the blocks in full: with PEFT by "
                "hf_sleep.sleep_lora_config(model), else by requires_grad_(True) on model.fast_weights."
            )


def warn_if_emulated(embeds: torch.Tensor) -> None:
    """Warn, once a process, when products are about to be computed in a dtype that the CPU has not."""
    if (dtype := emulated_dtype_of(embeds)) is None:
        return
    advice = 'call model.float(), or load it with dtype="float32"'
    if dtype != embeds.dtype:
        advice = "leave autocast out (bf16=False in TrainingArguments)"
    logger.warning_once(
        f"This model computes in {str(dtype).removeprefix('torch.')}, for which this CPU has no instructions: many "
        f"times slower than in float32. For speed {advice}; hf_sleep.default_dtype() knows a machine's dtype."
    )
