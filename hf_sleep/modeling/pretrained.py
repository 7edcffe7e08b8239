"""What a sleeping model and its fast-weight blocks alone have in common."""

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import SleepLMConfig
from ..layers import FastWeightBlock
from ..layers.recurrence import GATES


class SleepPreTrainedModel(PreTrainedModel):
    """What a sleeping model and its blocks alone share: how they are loaded and initialised."""

    config_class = SleepLMConfig
    _keep_in_fp32_modules_strict = list(GATES)
    _supports_sdpa = True
    _supports_flash_attn = True

    def make_blocks(self) -> nn.ModuleDict:
        """The config's blocks, by the decoder layer that they follow; their weights are anything."""
        sleep, text = self.config.sleep, self.config.text_config
        return nn.ModuleDict(
            {
                str(layer): FastWeightBlock(
                    sleep.block_kind,
                    text.hidden_size,
                    sleep.block_num_heads,
                    sleep.block_head_dim,
                    sleep.block_expand_v,
                    sleep.block_conv_size,
                    getattr(text, "rms_norm_eps", 1e-6),
                )
                for layer in sleep.block_layers
            }
        )

    @classmethod
    def is_custom_code(cls) -> bool:
        # All initialisation here leaves loaded weights alone. transformers doubts that of custom code, and then skips
        # every module without parameters of its own, as a block is.
        return False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # The base's experts are run by its own code, as the base was loaded to run them.
        return True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FastWeightBlock):
            with torch.no_grad():
                module.init_weights(getattr(self.config.text_config, "initializer_range", 0.02))
