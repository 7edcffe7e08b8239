"""SleepState: what a sequence remembers, as a value that can be kept, moved and resumed."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from .cache import Row, SleepCache, Tensors
from .offload import loaded
from .version import __version__

FORMAT = "hf_sleep.state.v1"
# Settings that what was read depends on; the number of passes may change from call to call.
FIXED_SETTINGS = ("window_size", "eviction", "num_sink_tokens", "loop_layers", "block_layers", "block_kind")
SAMPLES = 16


def fingerprint(model: nn.Module) -> str:
    """Hex digest of a model's parameters: names, shapes, and 16 values of each as bfloat16.

    The same weights give the same digest in any floating dtype and on any device; weights that were trained on do
    not.

    Raises:
        ValueError: weights that are sharded over ranks.
    """
    digest = hashlib.sha256()
    for name, module in sorted(model.named_modules()):
        with loaded(module):
            for key, parameter in sorted(module.named_parameters(recurse=False)):
                digest.update(f"{name}.{key}{tuple(parameter.shape)}".encode())
                digest.update(_sample(parameter.detach()))
    return digest.hexdigest()


def _sample(parameter: torch.Tensor) -> bytes:
    """Evenly spaced values; of a quantised parameter none."""
    if isinstance(parameter, DTensor):
        raise ValueError(
            "the model's weights are sharded over ranks (FSDP), and no rank has them all: save a whole checkpoint, "
            "load it in one process, and do this there"
        )
    if type(parameter) is not torch.Tensor or not parameter.is_floating_point() or not parameter.numel():
        return b""
    flat = parameter.flatten()
    index = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
    return flat[index.to(flat.device)].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()


@dataclass
class SleepState:
    """A batch of sequences between two calls: fast weights, the current window, and counters.

    Right after a sleep with hard eviction it is the fast weights and convolution tails alone; in the middle of a
    window it holds that window's KV too, and resumes token for token.

    Args:
        tensors: by name; batch first.
        rows: counters per sequence, in tokens.
        columns: columns read, pads included.
        settings: the `SleepConfig` fields that must agree.
        fingerprint: of the model that wrote it.
        dtype: of that model.

    Source: DESIGN decision; Lee et al. 2026 has S start from zero in every sequence.
    """

    tensors: dict[str, torch.Tensor]
    rows: list[Row]
    columns: int
    settings: dict[str, Any]
    fingerprint: str
    dtype: str

    @classmethod
    def from_cache(cls, model: Any, cache: SleepCache) -> "SleepState":
        """What `cache` holds, as `model` left it; shares its tensors, which nobody writes in place.

        Raises:
            ValueError: an empty cache, or one of another model.
        """
        if cache.is_empty:
            raise ValueError("the cache is empty: there is nothing to keep")
        if not cache.belongs_to(model):
            raise ValueError("the cache was written by another model: pass the model that filled it")
        return cls(
            tensors=dict(_named(cache.tensors)),
            rows=[dataclasses.replace(row) for row in cache.rows],
            columns=cache.columns,
            settings=_settings(model),
            fingerprint=fingerprint(model),
            dtype=str(model.dtype),
        )

    def to_cache(self, model: Any) -> SleepCache:
        """A cache for `model` to go on from, on `model`'s devices.

        Raises:
            ValueError: another model, other settings, or another dtype.
        """
        settings, digest = _settings(model), fingerprint(model)
        for key, saved in self.settings.items():
            if (here := settings[key]) != saved:
                raise ValueError(
                    f"the state was saved with {key}={saved!r}, this model has {key}={here!r}: set it to that"
                )
        if self.dtype != str(model.dtype):
            raise ValueError(f"the state is of a {self.dtype} model, this one is {model.dtype}: load it in that dtype")
        if self.fingerprint != digest:
            raise ValueError(
                f"the state was saved by another model (fingerprint {self.fingerprint[:12]}, this one is "
                f"{digest[:12]}): fast weights mean nothing to a model with other weights"
            )
        cache = SleepCache()
        tensors = _unnamed(self.tensors, model.slot_devices())
        cache.start(model, len(self.rows), tensors, model.fast_slots())
        cache.rows = [dataclasses.replace(row) for row in self.rows]
        cache.columns = self.columns
        return cache

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file; load it with `SleepState.load`."""
        header = {
            "rows": [dataclasses.asdict(row) for row in self.rows],
            **{key: getattr(self, key) for key in ("columns", "settings", "fingerprint", "dtype")},
        }
        tensors = {name: t.detach().contiguous().clone() for name, t in self.tensors.items()}
        save_file(tensors, path, metadata={"format": FORMAT, "version": __version__, "state": json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SleepState":
        """Read what `save` wrote.

        Raises:
            ValueError: a file that is not a sleep state.
        """
        try:
            opened = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is no sleep state: it is not a safetensors file ({error})") from error
        with opened as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path} is no sleep state: its format is {metadata.get('format')!r}, {FORMAT!r} works"
                )
            header = json.loads(metadata["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        rows = [Row(**row) for row in header.pop("rows")]
        return cls(tensors=tensors, rows=rows, **header)

    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


def _settings(model: Any) -> dict[str, Any]:
    plain = model.config.sleep.to_dict()
    return {key: plain[key] for key in FIXED_SETTINGS}


def _named(tensors: Tensors) -> list[tuple[str, torch.Tensor]]:
    named = []
    for prefix, pairs in (("layers", dict(enumerate(tensors.layers))), ("window_start", tensors.window_start)):
        for slot, pair in pairs.items():
            named += [(f"{prefix}.{slot}.{i}", t) for i, t in enumerate(pair or ())]
    return named if tensors.hidden is None else [*named, ("hidden", tensors.hidden)]


def _unnamed(named: dict[str, torch.Tensor], devices: list[torch.device]) -> Tensors:
    def pair(prefix: str, slot: int) -> Any:
        name = f"{prefix}.{slot}."
        return (
            (named[name + "0"].to(devices[slot]), named[name + "1"].to(devices[slot])) if name + "0" in named else None
        )

    layers = [pair("layers", slot) for slot in range(len(devices))]
    start = {slot: p for slot in range(len(devices)) if (p := pair("window_start", slot)) is not None}
    hidden = named.get("hidden")
    return Tensors(layers, start, None if hidden is None else hidden.to(devices[0]))
