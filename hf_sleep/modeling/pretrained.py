"""Building blocks that a sleeping model and its new weights alone have in common."""

import hashlib
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..engine import Between
from ..layers import FastWeightBlock
from ..lm_config import SleepLMConfig
from ..placement import compute_device
from ..registry import BETWEEN
from .inputs import check_checkpointing


class SleepPreTrainedModel(PreTrainedModel):
    """Base class of a sleeping model and of its new weights alone: how they are built, loaded and initialised."""

    config_class = SleepLMConfig
    _keep_in_fp32_modules_strict: Any = None
    _supports_sdpa = True
    _supports_flash_attn = True

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without those who watch this model."""
        hooks = self.__dict__.keys() & {"_sleep_hooks", "_pass_hooks"}
        return self.__dict__ | {name: OrderedDict() for name in hooks}

    @property
    def device(self) -> torch.device:
        """Where it computes and takes ids, also when accelerate keeps its weights elsewhere."""
        return compute_device(self)

    def make_blocks(self) -> nn.ModuleDict:
        """Make the config's blocks, by the decoder layer that they follow. Their weights are anything."""
        sleep, text = self.config.sleep, self.config.text_config
        half_lives = sleep.block_half_lives and tuple(windows * sleep.window_size for windows in sleep.block_half_lives)
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
                    half_lives,
                )
                for layer in sleep.block_layers
            }
        )

    def keep_in_fp32(self, of_base: tuple[str, ...] = ()) -> None:
        """Let the parameters that a block's mixer or the base's recurrent layers want in fp32 stay in it.

        Args:
            of_base: last parts of the base's names.
        """
        blocks: Any = self.fast_weights
        of_blocks = {name for block in blocks.values() for name in block.fp32_parameters}
        self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), *of_blocks, *of_base}

    @property
    def quantizer(self) -> Any:
        """Of the base, or of this model where it was loaded quantised as a whole; `None`: there is none."""
        return getattr(self.lm, "hf_quantizer", None) or getattr(self, "hf_quantizer", None)

    def make_between(self) -> Between:
        """Make the step between two passes that the config names."""
        return BETWEEN[self.config.sleep.between](self.config.text_config.hidden_size)

    @classmethod
    def is_custom_code(cls) -> bool:
        # All initialisation here leaves loaded weights alone. transformers doubts that of custom code, and then skips
        # every module without parameters of its own, as a block is.
        return False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # The base's experts are run by its own code, as the base was loaded to run them.
        return True

    def _set_gradient_checkpointing(self, enable: bool = True, **how: Any) -> None:
        # The base's own drops its cache in training, and what was retained: a whole (window, pass) is recomputed here.
        check_checkpointing(**how)
        self.gradient_checkpointing = enable

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, FastWeightBlock | Between):
            return
        # transformers asks for first values where any of a module's are missing. What was loaded stays, however the
        # module sets its own.
        tensors = (*module.parameters(), *module.buffers())
        loaded = [(t, t.clone()) for t in tensors if getattr(t, "_is_hf_initialized", False)]
        with torch.no_grad():
            if isinstance(module, FastWeightBlock):
                module.init_weights(getattr(self.config.text_config, "initializer_range", 0.02))
            else:
                module.init_weights()
            for t, value in loaded:
                t.copy_(value)


def draw_blocks(model: Any, base: PreTrainedModel) -> None:
    """Give a model's new weights, which are on the CPU, the values that follow from its base.

    The same base gets the same ones, in every process and on any device, or no memory of a fresh retrofit could be
    kept. They are drawn in float64, since how float32 is drawn depends on the processor.
    """
    std, high = getattr(base.config, "initializer_range", 0.02), torch.promote_types(base.dtype, torch.float32)
    layers, last = model.decoder.layers, model.config.sleep.loop_layers[1] - 1
    drawn = [(name, block, layers[int(name)]) for name, block in model.fast_weights.items()]
    drawn.append(("between", model.between, layers[last]))
    for name, module, beside in drawn:
        seed = hashlib.sha256(f"{model.config.base_fingerprint}/{name}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(seed[:8]))
        module.double()
        module.init_weights(*([generator] if module is model.between else [std, generator]))
        fp32 = module.fp32_parameters if isinstance(module, FastWeightBlock) else ()
        for key, t in (*module.named_parameters(), *module.named_buffers()):
            if t.is_floating_point():
                t.data = t.data.float().to(high if key.rpartition(".")[2] in fp32 else base.dtype)
        module.to(compute_device(beside))
        for part in module.modules():
            part._is_hf_initialized = True
    of_base = getattr(base, "hf_device_map", None) or {}
    if len({*of_base.values()}) > 1 or "disk" in of_base.values():
        # By it transformers knows what to gather when it saves, and Trainer that it must not move anything.
        places = {module: compute_device(beside) for _, module, beside in drawn}
        new = {name: places[part] for name, part in model.named_modules() if part in places}
        model.hf_device_map = {f"lm.{name}".rstrip("."): device for name, device in of_base.items()}
        spelt = {torch.device(device): device for device in of_base.values() if device != "disk"}
        model.hf_device_map |= {name: spelt.get(place, str(place)) for name, place in new.items()}
