"""Ouro (LoopLM): a decoder that runs all its layers several times over and learns after which loop to answer."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...checks import reject
from ...compat import CACHE, BaseModelOutputWithPast, CausalLMOutputWithPast, GenerationMixin, takes_cache
from .configuration import OuroConfig, check_threshold


@dataclass
class OuroModelOutput(BaseModelOutputWithPast):
    """Output of `OuroModel`. R is the number of loops that ran: T, or k + 1 with `exit_at_step=k`.

    Args:
        last_hidden_state: `[B, S, C]`, what the head reads: what the exit setting selects of the loops' outputs.
        cache: the cache, in which layer i of loop t has slot `t * num_hidden_layers + i`.
        hidden_states: with `output_hidden_states=True`, R·L + 1 tensors `[B, S, C]`: the embeddings, then the output of
            layer i in loop t at `1 + t * num_hidden_layers + i`, before the norm that closes the loop.
        attentions: with `output_attentions=True` and eager attention, R·L maps `[B, H, S, keys]` in the same order.
        hidden_states_per_step: R tensors `[B, S, C]`, the outputs of the loops, normed.
        exit_probabilities: `[B, S, R]`, at least float32: the probability of answering from each loop. Over all T loops
            they sum to 1.
        gate_logits: `[B, S, R]`, the exit gate's outputs before the sigmoid. The last of T is not used.
    """

    hidden_states_per_step: tuple[torch.Tensor, ...] | None = None
    exit_probabilities: torch.Tensor | None = None
    gate_logits: torch.Tensor | None = None


@dataclass
class OuroCausalLMOutput(CausalLMOutputWithPast):
    """Output of `OuroForCausalLM`: the fields of `OuroModelOutput` and these.

    Args:
        loss: scalar, with `labels`: the shifted cross-entropy of `logits`.
        logits: `[B, S, vocab]`, or of the positions in `logits_to_keep` alone.
        logits_per_step: with `output_logits_per_step=True`, such logits of every loop that ran.
    """

    hidden_states_per_step: tuple[torch.Tensor, ...] | None = None
    exit_probabilities: torch.Tensor | None = None
    gate_logits: torch.Tensor | None = None
    logits_per_step: tuple[torch.Tensor, ...] | None = None


def exit_distribution(gate_logits: torch.Tensor, total_ut_steps: int) -> torch.Tensor:
    """The probability of answering from each loop: p_t = λ_t Π_{j<t} (1 − λ_j), and the rest for the last of all.

    Args:
        gate_logits: `[..., R]`, of which λ is the sigmoid.
        total_ut_steps: T. With R < T these are the first R of the T probabilities.

    Returns:
        `[..., R]`, in float32 or what is wider.

    Source: Zhu et al. 2025 (arXiv 2510.25741).
    """
    logits = gate_logits.to(torch.promote_types(gate_logits.dtype, torch.float32))
    left = torch.ones_like(logits[..., 0])
    probabilities = []
    for step, logit in enumerate(logits.unbind(-1)):
        probabilities.append(left * logit.sigmoid() if step < total_ut_steps - 1 else left)
        left = left * (-logit).sigmoid()
    return torch.stack(probabilities, dim=-1)


class _LoopSlots:
    """A cache as the layers of one loop see it: layer i writes to slot `first + i`."""

    def __init__(self, cache: Cache, first: int):
        self.cache = cache
        self.first = first

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cache.update(keys, values, self.first + layer_idx, **kwargs)


class OuroDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each with a norm before and after it inside the residual branch."""

    def __init__(self, config: OuroConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm_2 = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm_2 = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """`[B, S, C]` to `[B, S, C]`; `cache.update(keys, values, layer_idx)` is called once."""
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **{CACHE: cache},
            **kwargs,
        )
        hidden_states = hidden_states + self.input_layernorm_2(attended)
        transformed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.post_attention_layernorm_2(transformed)


class OuroPreTrainedModel(PreTrainedModel):
    """Base of the Ouro models: how they are loaded, placed and recorded."""

    config: OuroConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OuroDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    # Not _supports_attention_backend: other servers keep one KV slot a layer, and the loops would overwrite each other.
    _can_record_outputs = {"hidden_states": OuroDecoderLayer, "attentions": LlamaAttention}


class OuroModel(OuroPreTrainedModel):
    """Ouro without its head.

    Args:
        config: [`OuroConfig`].

    Source: Zhu et al. 2025 (arXiv 2510.25741).
    """

    def __init__(self, config: OuroConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(OuroDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        exit_at_step: int | None = None,
        exit_threshold: float | None = None,
        use_weighted_exit: bool = False,
        **kwargs: Any,
    ) -> OuroModelOutput:
        """Run the loops. Of the three exit settings one may be given; with none, `config.early_exit_threshold` holds.

        Args:
            input_ids: token ids `[B, S]`; or `inputs_embeds` `[B, S, C]`.
            attention_mask: `[B, past + S]`, 0 at pads; or what `generate` makes of it for a static cache.
            position_ids: `[B, S]`; `None`: counted from the cache's end.
            cache: a cache. One made for `num_hidden_layers` layers gets the slots of the further loops here.
            exit_at_step: k from 0 to T − 1. Only loops 0 to k run and fill the cache, and loop k answers.
            exit_threshold: q from 0 to 1. A token is answered from the first loop at which the cumulated exit
                distribution is at least q; at 1 always from the last, even where rounding lets the sum reach 1 earlier.
                It selects what is read: all loops run, as later tokens attend to them.
            use_weighted_exit: the loops' outputs, weighted by the exit distribution, answer.

        Returns:
            [`OuroModelOutput`]

        Raises:
            ValueError: two exit settings, one out of range, or a cache whose deeper loops have seen fewer tokens. It is
                raised before anything is changed.

        Source: Zhu et al. 2025 (arXiv 2510.25741).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("OuroModel needs either input_ids or inputs_embeds, and not both")
        self.config.check_loops()
        steps = self.config.total_ut_steps
        if (exit_at_step is not None) + (exit_threshold is not None) + bool(use_weighted_exit) > 1:
            raise ValueError(
                f"{exit_at_step=}, {exit_threshold=} and {use_weighted_exit=} ask for different exits: give one of them"
            )
        if exit_at_step is not None and (type(exit_at_step) is not int or not 0 <= exit_at_step < steps):
            raise reject("exit_at_step", exit_at_step, f"with total_ut_steps={steps} it must be from 0 to {steps - 1}")
        if exit_threshold is None:
            exit_threshold = self.config.early_exit_threshold
        check_threshold("exit_threshold", exit_threshold)
        loops = steps if exit_at_step is None else exit_at_step + 1

        if use_cache and cache is None:
            cache = DynamicCache()
        if cache is not None:
            self._open_slots(cache, loops)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + past
        if isinstance(attention_mask, dict):
            mask = attention_mask["full_attention"]
        else:
            mask = create_causal_mask(self.config, inputs_embeds, attention_mask, cache, position_ids)
        rope = self.rotary_emb(inputs_embeds, position_ids)

        hidden_states = inputs_embeds
        per_step, gate_outputs = [], []
        for step in range(loops):
            slots = None if cache is None else _LoopSlots(cache, step * len(self.layers))
            for layer in self.layers:
                hidden_states = layer(
                    hidden_states,
                    attention_mask=mask,
                    position_embeddings=rope,
                    position_ids=position_ids,
                    use_cache=use_cache,
                    **{CACHE: slots},
                    **kwargs,
                )
            hidden_states = self.norm(hidden_states)
            per_step.append(hidden_states)
            gate_outputs.append(self.early_exit_gate(hidden_states))
        gate_logits = torch.cat(gate_outputs, dim=-1)
        probabilities = exit_distribution(gate_logits, steps)

        if use_weighted_exit:
            mixed = (probabilities.unsqueeze(-1) * torch.stack(per_step, dim=-2)).sum(-2)
            hidden_states = mixed.to(hidden_states.dtype)
        elif exit_at_step is None and exit_threshold < 1:
            first = (probabilities.cumsum(-1) < exit_threshold).sum(-1).clamp(max=steps - 1)
            hidden_states = torch.stack(per_step, dim=-2).take_along_dim(first[..., None, None], dim=-2).squeeze(-2)
        return OuroModelOutput(
            last_hidden_state=hidden_states,
            **{CACHE: cache},
            hidden_states_per_step=tuple(per_step),
            exit_probabilities=probabilities,
            gate_logits=gate_logits,
        )

    def _open_slots(self, cache: Cache, loops: int) -> None:
        """Give `cache` a slot for each layer of so many loops; an empty one for fewer layers is extended in place."""
        depth = len(self.layers)
        # A static cache's length is on the device: a compiled step, which follows one that was checked, asks no more.
        if not torch.compiler.is_compiling():
            held = [int(cache.get_seq_length(step * depth)) for step in range(loops)]
            if lagging := [step for step in range(loops) if held[step] != held[0]]:
                raise ValueError(
                    f"the cache holds {held[0]} tokens of loop 0 and {held[lagging[0]]} of loop {lagging[0]}, as "
                    f"after exit_at_step={lagging[0] - 1}, so {loops} loops cannot continue from it: use "
                    f"exit_at_step={lagging[0] - 1} or less, or read the tokens again with a new cache"
                )
        if cache.layer_class_to_replicate is None:
            missing = range(len(cache.layers), loops * depth)
            cache.layers.extend([copy.deepcopy(cache.layers[slot % depth]) for slot in missing])


class OuroForCausalLM(OuroPreTrainedModel, GenerationMixin):
    """Ouro with its language-model head. `generate` takes the exit settings of the forward as keywords.

    Args:
        config: [`OuroConfig`].

    Source: Zhu et al. 2025 (arXiv 2510.25741).
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: OuroConfig):
        super().__init__(config)
        self.model = OuroModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        exit_at_step: int | None = None,
        exit_threshold: float | None = None,
        use_weighted_exit: bool = False,
        output_logits_per_step: bool = False,
        **kwargs: Any,
    ) -> OuroCausalLMOutput:
        """Logits and loss. The head is linear, so it runs once, on what the exit setting selects or mixes.

        Args:
            labels: token ids `[B, S]`, −100 where there is no target. With labels and no exit setting the weighted exit
                is used, for the logits as well, as in the published code.
            logits_to_keep: compute only the last so many positions' logits (0: all), or those of a 1-D index tensor.
            output_logits_per_step: return the logits of every loop too.
            kwargs: the rest is as in [`OuroModel`]; `num_items_in_batch` goes to the loss.

        Returns:
            [`OuroCausalLMOutput`]

        Raises:
            ValueError: as [`OuroModel`] does.
        """
        asked = use_weighted_exit or exit_at_step is not None or exit_threshold is not None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            exit_at_step=exit_at_step,
            exit_threshold=exit_threshold,
            use_weighted_exit=use_weighted_exit or (labels is not None and not asked),
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = per_step = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if output_logits_per_step:
            per_step = tuple(self.lm_head(hidden_states[:, kept]) for hidden_states in outputs.hidden_states_per_step)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return OuroCausalLMOutput(loss=loss, logits=logits, logits_per_step=per_step, **rest)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: its cache keeps one slot a layer.

        Raises:
            NotImplementedError: always, with what works.
        """
        raise NotImplementedError(
            "continuous batching keeps one KV slot a layer, and Ouro needs one per loop and layer: use generate"
        )


AutoModel.register(OuroConfig, OuroModel, exist_ok=True)
AutoModelForCausalLM.register(OuroConfig, OuroForCausalLM, exist_ok=True)
# Trainer's label smoothing shifts the labels of the classes that are named here; `register` names none.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[OuroConfig.model_type] = OuroForCausalLM.__name__
