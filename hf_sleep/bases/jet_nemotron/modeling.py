"""Jet-Nemotron: Jet layers, full attention and sliding-window attention, as its published checkpoints have them.

Attention, MLP and RoPE are Qwen2's; the Jet layers are `hf_sleep.layers.Jet`, the mixer that a retrofit injects. Names
and numbers are the checkpoints'. Only fresh weights differ: convolution taps start at "the current token", not at zero.

Source: Gu et al. 2025 (Jet-Nemotron, arXiv 2508.15884).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2RotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...compat import CACHE, BaseModelOutputWithPast, CausalLMOutputWithPast, takes_cache
from ...generation import RecurrentGenerationMixin
from ...layers import Jet
from ...memory import FastWeights
from ...packing import refuse_packed
from .configuration import JetNemotronConfig


class JetNemotronRMSNorm(nn.RMSNorm):
    """RMSNorm in fp32, its weight included, with one cast at the end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        compute = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(compute), self.normalized_shape, self.weight.to(compute), self.eps).to(x.dtype)


class RealFirst(NamedTuple):
    """Moves each row's real tokens to the front (`order` `[B, T, 1]`) and back (`inverse`); `lengths` is `[B]`."""

    order: torch.Tensor
    inverse: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, attention_mask: torch.Tensor | None, tokens: int) -> "RealFirst | None":
        """`None` where none of the last `tokens` columns of a `[B, S]` mask is a pad, or there is no mask."""
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: Jet layers must know which tokens are pads, "
                "so it must be [batch, tokens], or a dictionary with such a mask for 'linear_attention'"
            )
        real = attention_mask[:, -tokens:].bool()
        if real.all():
            return None
        order = (~real).int().argsort(dim=1, stable=True)
        return cls(order.unsqueeze(-1), order.argsort(dim=1).unsqueeze(-1), real.sum(dim=1))


class JetNemotronDecoderLayer(GradientCheckpointingLayer):
    """Mixer (Jet or attention) and MLP, each `x + f(norm(x))`."""

    def __init__(self, config: JetNemotronConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        if config.layer_types[layer_idx] == "linear_attention":
            jet = config.efficient_attention_config["jet"]
            self.self_attn: nn.Module = Jet(
                config.hidden_size,
                jet["num_heads"],
                jet["head_dim"],
                jet["expand_v"],
                jet["conv_size"],
                float(jet["norm_eps"]),
                jet["dconv_generator_reduction"],
            )
        else:
            self.self_attn = Qwen2Attention(config, layer_idx)
        self.mlp = Qwen2MLP(config)
        self.input_layernorm = JetNemotronRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = JetNemotronRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """`[B, T, C]` to `[B, T, C]`; `attention_mask` is a Jet layer's `RealFirst`, or what attention takes."""
        x = self.input_layernorm(hidden_states)
        if isinstance(self.self_attn, Jet):
            x = self.mix(x, attention_mask, cache)
        else:
            x, _ = self.self_attn(x, attention_mask=attention_mask, **{CACHE: cache}, **kwargs)
        x = hidden_states + x
        return x + self.mlp(self.post_attention_layernorm(x))

    def mix(self, x: torch.Tensor, real: RealFirst | None, cache: Cache | None) -> torch.Tensor:
        """Continue the Jet mixer from what `cache` holds of this layer; pads read zero and leave no trace."""
        jet: Any = self.self_attn
        if cache is None or not cache.has_previous_state(self.layer_idx):
            state: FastWeights = jet.empty(len(x), x.device, x.dtype)
        else:
            layer = cache.layers[self.layer_idx]
            state = FastWeights(layer.recurrent_states[0], layer.conv_states[0])
            if torch.is_grad_enabled():
                # The cache is written in place, which a graph that still needs its old content would not survive.
                state = FastWeights(*(t.clone() for t in state))
        if real is None:
            mixed, state = jet(x, state)
        else:
            mixed, state = jet(x.take_along_dim(real.order, dim=1), state, real.lengths)
            mixed = mixed.take_along_dim(real.inverse, dim=1)
        if cache is not None:
            cache.update_recurrent_state(state[0], self.layer_idx)
            cache.update_conv_state(state[1], self.layer_idx)
        return mixed


class JetNemotronPreTrainedModel(PreTrainedModel):
    """Base of the Jet-Nemotron models: loading, saving and fresh weights."""

    config: JetNemotronConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["JetNemotronDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _keep_in_fp32_modules_strict = list(Jet.fp32_parameters)
    _supports_sdpa = True
    _supports_flash_attn = True
    _is_stateful = True
    _can_record_outputs = {"hidden_states": JetNemotronDecoderLayer, "attentions": Qwen2Attention}

    @classmethod
    def is_custom_code(cls) -> bool:
        # All initialisation here leaves loaded weights alone. transformers doubts that of custom code, and then skips a
        # Jet layer whose own parameters were loaded, whatever else of it is missing.
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Jet):
            module.draw_weights(self.config.initializer_range)
            parts: Any = module.modules()
            for part in parts:  # or whatever comes to its linear layers next would undo it
                part._is_hf_initialized = True


class JetNemotronModel(JetNemotronPreTrainedModel):
    """Jet-Nemotron without a head: token ids to hidden states `[B, T, C]`."""

    def __init__(self, config: JetNemotronConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(JetNemotronDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = JetNemotronRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Read tokens.

        Args:
            input_ids: `[B, T]`, or instead of it `inputs_embeds` `[B, T, C]`.
            attention_mask: `[B, past + T]`, zero at pads, which may stand anywhere. They are never read, but between
                two tokens they take up places in a sliding layer's window.
            position_ids: `[B, T]`; by default real tokens are counted from 0.
            cache: `DynamicCache(config=model.config)`, or what an earlier call returned.
            use_cache: whether to make a cache where none is given.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`, a cache made without the model's config, a
                mask that does not tell Jet layers which tokens are pads, or several sequences packed into a row.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        refuse_packed(kwargs)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = x.shape[1]
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if cache is not None and len(cache.layers) != len(self.layers):
            raise ValueError(
                f"cache has {len(cache.layers)} layers, the model {len(self.layers)}: make it with "
                "DynamicCache(config=model.config)"
            )
        if position_ids is None:
            if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
                position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -tokens:]
            else:
                past = 0 if cache is None else cache.get_seq_length()
                position_ids = (torch.arange(tokens, device=x.device) + past).unsqueeze(0)
        elif attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2):
            refuse_packed({"position_ids": position_ids}, attention_mask)
        masks = attention_mask
        if not isinstance(masks, dict):
            arguments = {
                "config": self.config,
                "inputs_embeds": x,
                "attention_mask": attention_mask,
                CACHE: cache,
                "position_ids": position_ids,
            }
            masks = {"linear_attention": RealFirst.of(attention_mask, tokens)}
            masks["full_attention"] = create_causal_mask(**arguments)
            if self.config.sliding_window is not None:
                masks["sliding_attention"] = create_sliding_window_causal_mask(**arguments)
        elif "linear_attention" in masks:
            masks = masks | {"linear_attention": RealFirst.of(masks["linear_attention"], tokens)}
        elif "linear_attention" in self.config.layer_types:
            raise ValueError("attention_mask has no 'linear_attention': give the [batch, tokens] mask of pads, or None")
        rope = self.rotary_emb(x, position_ids)
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            x = layer(
                x,
                attention_mask=masks[kind],
                position_embeddings=rope,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), **{CACHE: cache})


class JetNemotronForCausalLM(JetNemotronPreTrainedModel, RecurrentGenerationMixin):
    """Jet-Nemotron with its language modelling head, which is tied to the embedding in the published checkpoints."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: JetNemotronConfig):
        super().__init__(config)
        self.model = JetNemotronModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """`JetNemotronModel.forward`, then logits `[B, T, vocab]`.

        Args:
            labels: `[B, T]`, the input ids themselves (they are shifted here), -100 where there is no target.
            logits_to_keep: the last so many positions' logits, or these positions'; 0 is all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.cache},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


AutoModel.register(JetNemotronConfig, JetNemotronModel, exist_ok=True)
AutoModelForCausalLM.register(JetNemotronConfig, JetNemotronForCausalLM, exist_ok=True)
# Trainer's label smoothing shifts the labels of the classes that are named here; `register` names none.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[JetNemotronConfig.model_type] = JetNemotronForCausalLM.__name__
