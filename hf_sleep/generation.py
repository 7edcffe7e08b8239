"""`generate` for models with a recurrent memory: pads never reach it, and what would have to rewind it is refused."""

import functools
from typing import Any

import torch
from transformers import StoppingCriteriaList

from .compat import CACHE, GenerationMixin


class Ended(StoppingCriteriaList):
    """Stopping criteria that remember where rows ended: from there on generate feeds them pads."""

    lengths: torch.Tensor | None = None
    """`[B]`, tokens of a row's sequence up to its end; a huge number where it has not ended."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        now = torch.where(done, input_ids.shape[1], torch.iinfo(torch.long).max)
        self.lengths = now if self.lengths is None else torch.minimum(self.lengths, now)
        return done

    def pads(self, length: int) -> torch.Tensor | None:
        """`[B, length]`, the pads among the columns of sequences of that length; `None` where there are none."""
        if self.lengths is None or not bool((self.lengths < length).any()):
            return None
        return torch.arange(length, device=self.lengths.device) >= self.lengths.unsqueeze(1)


class RecurrentGenerationMixin(GenerationMixin):
    """`generate` for a model that cannot take back what it has read."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse, and with it `generate_batch` and `generate(cache_implementation="paged")`.

        Raises:
            NotImplementedError: always, with what works.
        """
        raise NotImplementedError(
            "continuous batching keeps its sequences in a paged KV cache, which cannot hold fast weights: use "
            "generate, whose batches may hold rows of any length"
        )

    def _validate_generation_mode(self, generation_mode: Any, generation_config: Any, *args: Any) -> None:
        if generation_config.is_assistant:
            raise ValueError(
                f"a {type(self).__name__} cannot be the assistant_model of another model: of what it drafts, what the "
                "other rejects would stay in its fast weights, which cannot be rewound. Use a model of attention alone "
                "as the assistant"
            )
        super()._validate_generation_mode(generation_mode, generation_config, *args)

    def _sample(
        self, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # Without such a criterion a row that has ended speaks on, and what it says is part of the answer; with a row
        # alone, generate ends where it does.
        if len(input_ids) > 1 and any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria):
            stopping_criteria = kwargs["ended"] = Ended(stopping_criteria)
        return super()._sample(input_ids, logits_processor, stopping_criteria, *args, **kwargs)

    # generate asks its signature which keywords it takes.
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        ended: Ended | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if ended is not None and (pads := ended.pads(input_ids.shape[1])) is not None:
            if attention_mask is None:
                cache = kwargs.get(CACHE)
                past = 0 if cache is None else int(cache.get_seq_length())
                new = input_ids.shape[1] if next_sequence_length is None else next_sequence_length
                attention_mask = input_ids.new_ones(len(input_ids), past + new)
            columns = min(attention_mask.shape[1], pads.shape[1])
            said = attention_mask[:, -columns:].masked_fill(pads[:, -columns:], 0)
            attention_mask = torch.cat((attention_mask[:, :-columns], said), dim=1)
        kwargs.pop("tokenizer", None)
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, attention_mask=attention_mask, **kwargs
        )
