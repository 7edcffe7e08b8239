"""Ouro's config: read and written in the form of its published checkpoints."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig

from ...checks import reject
from ..upstream import UpstreamConfig


@strict
class OuroConfig(UpstreamConfig):
    """Config of Ouro; the defaults are those of Ouro-1.4B. Reads and writes the published config.json as it is.

    Args:
        total_ut_steps: T, how often all layers run over every token. Read at every forward, so it may be changed on a
            loaded model's `config`.
        early_exit_threshold: q from 0 to 1. A token is answered from the first loop by which the exit distribution has
            reached q; at 1 always from the last.
        num_key_value_heads: `None`: as many as `num_attention_heads`.
        head_dim: `None`: `hidden_size // num_attention_heads`.
        layer_types: `"full_attention"` for every layer, the only kind there is.
        max_window_layers: kept for the file's sake; it means nothing without windows.

    Raises:
        ValueError: naming the field, what it got and what would work.

    Source: Zhu et al. 2025 (arXiv 2510.25741).
    """

    model_type = "ouro"
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
        "hidden_states_per_step",
        "exit_probabilities",
        "gate_logits",
    ]
    default_theta = 1_000_000.0
    # Read by the Llama modules: no projection of Ouro has a bias.
    attention_bias: ClassVar[bool] = False
    mlp_bias: ClassVar[bool] = False

    vocab_size: int = 49152
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 65536
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_dropout: float | int = 0.0
    total_ut_steps: int = 4
    early_exit_threshold: float | int = 1.0
    layer_types: list[str] | None = None
    max_window_layers: int | None = None
    sliding_window: int | None = None
    use_sliding_window: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.max_window_layers is None:
            self.max_window_layers = self.num_hidden_layers
        super().__post_init__(**kwargs)
        self.check_loops()
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if kv_heads < 1 or heads % kv_heads:
            raise reject("OuroConfig.num_key_value_heads", kv_heads, f"it must divide num_attention_heads={heads}")
        if self.use_sliding_window:
            raise reject("OuroConfig.use_sliding_window", True, "every layer attends to all tokens: set it to False")
        if self.layer_types != ["full_attention"] * self.num_hidden_layers:
            fix = f"all num_hidden_layers={self.num_hidden_layers} are 'full_attention': leave it out"
            raise reject("OuroConfig.layer_types", self.layer_types, fix)

    def check_loops(self) -> None:
        """Raise `ValueError` unless the settings that may be changed on a loaded model can work."""
        if self.total_ut_steps < 1:
            raise reject("OuroConfig.total_ut_steps", self.total_ut_steps, "it must be at least 1")
        check_threshold("OuroConfig.early_exit_threshold", self.early_exit_threshold)


def check_threshold(field: str, value: object) -> None:
    """Raise `ValueError` unless `value` is a probability."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise reject(field, value, "it must be a probability from 0 to 1, where 1 means the last loop")


AutoConfig.register(OuroConfig.model_type, OuroConfig, exist_ok=True)
