"""Configs in the form that a model's own (transformers 4) code reads and writes."""

from typing import Any

from transformers import PreTrainedConfig


def upstream_form(values: dict[str, Any]) -> dict[str, Any]:
    """A transformers 5 config dictionary as transformers 4 wrote it; `values` itself is left alone.

    `rope_parameters` becomes `rope_theta` and `rope_scaling` (`None` for plain RoPE), `dtype` becomes `torch_dtype`
    (left out where there is none). transformers 5 reads these names too.
    """
    values = dict(values)
    rope = dict(values.pop("rope_parameters", None) or {})
    if "rope_theta" in rope:
        values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    dtype = values.pop("dtype", None)
    if dtype is not None:
        values["torch_dtype"] = dtype
    return values


class UpstreamConfig(PreTrainedConfig):
    """A config whose `to_dict`, and so its config.json, has the upstream form."""

    # Writing config.json reads every key it writes, and the inherited property logs that its name is out of date.
    torch_dtype = property(lambda self: self.dtype, lambda self, value: setattr(self, "dtype", value))

    def to_dict(self) -> dict[str, Any]:
        return upstream_form(super().to_dict())
