"""SleepState: what a sequence remembers, as a value that can be kept, moved and resumed."""

import dataclasses
import hashlib
import io
import json
import os
import re
import reprlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn
from torch.distributed.tensor import DTensor

from .cache import SleepCache, unwrapped
from .checks import NewerFormatError
from .config import SleepConfig
from .files import write_file
from .memory import KV, Counters, FastWeights, Memory
from .placement import loaded
from .version import __version__

FIRST_FORMAT = "hf_sleep.state.v1"
FORMAT = "hf_sleep.state.v2"
FORMAT_WITH_ABOUT = "hf_sleep.state.v3"
FORMATS = {
    FIRST_FORMAT: {"format", "version", "state"},
    FORMAT: {"format", "version", "state", "sha256"},
    FORMAT_WITH_ABOUT: {"format", "version", "state", "sha256", "about"},
}
NO_DIGEST = "0" * 64
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
HEADER = {"rows": list, "columns": int, "settings": dict, "fingerprint": str, "dtype": str}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
COUNTERS = [field.name for field in dataclasses.fields(Counters) if field.name != "pads"]
# Settings that what was read depends on; the number of passes may change from call to call.
FIXED_SETTINGS = ("window_size", "eviction", "num_sink_tokens", "loop_layers", "block_layers", "block_kind")
# The same, which files from before there was a choice leave out, as do files in which it is the usual one.
OPTIONAL_SETTINGS = {"between": "none"}
SAMPLES = 16


def fingerprint(model: nn.Module) -> str:
    """Hex digest of a model's parameters: names, shapes, and 16 values of each as bfloat16.

    The same weights give the same digest in any floating dtype and on any device; weights that were trained on do not.

    Raises:
        ValueError: weights that are sharded over ranks.
    """
    digest = hashlib.sha256()
    for name, module in sorted(model.named_modules()):
        adapters = getattr(module, "active_adapters", None)
        if isinstance(adapters, list) and (adapters != ["default"] or getattr(module, "disable_adapters", False)):
            # PEFT's: which of them compute is no parameter.
            digest.update(f"{name}:{adapters}:{module.disable_adapters}".encode())
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
    index = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64, device="cpu").long()
    return flat[index.to(flat.device)].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()


@dataclass(repr=False)
class SleepState:
    """A batch of sequences between two calls: fast weights, the current window, and counters.

    Right after a sleep with hard eviction it is the fast weights and convolution tails alone. In the middle of a window
    it holds that window's KV too, and resumes token for token.

    Args:
        tensors: by name; batch first.
        rows: counters per sequence, in tokens.
        columns: columns read, pads included.
        settings: the `SleepConfig` fields that must agree.
        fingerprint: of the model that wrote it.
        dtype: of that model.
        about: what else is to be known of it, JSON: where it comes from, as a `SleepSession` keeps it.

    Source: ours; in Lee et al. 2026 (arXiv 2605.26099), Alg. 1, S starts from zero in every sequence.
    """

    tensors: dict[str, torch.Tensor]
    rows: list[Counters]
    columns: int
    settings: dict[str, Any]
    fingerprint: str
    dtype: str
    about: dict[str, Any] | None = None

    @classmethod
    def from_cache(cls, model: Any, cache: SleepCache) -> "SleepState":
        """Take what `cache` holds, as `model` left it; shares its tensors, which nobody writes in place.

        Raises:
            ValueError: an empty cache, or one of another model.
        """
        model = unwrapped(model)
        if cache.is_empty:
            raise ValueError("the cache is empty: there is nothing to keep. Call the model with it first")
        if not cache.belongs_to(model):
            raise ValueError("the cache was written by another model: pass the model that filled it")
        cache.check_settings(model)
        return cls(
            tensors=dict(_named(cache.memory)),
            rows=list(cache.memory.counters),
            columns=cache.memory.columns,
            settings=_settings(model),
            fingerprint=fingerprint(model),
            dtype=str(model.dtype),
        )

    def to_cache(self, model: Any) -> SleepCache:
        """A cache for `model` to continue from, on `model`'s devices. The model reads one token, to compare with.

        Raises:
            ValueError: another model, other settings, another dtype, or what this model cannot have left.
        """
        config, model = self._check(), unwrapped(model)
        settings, digest = _settings(model), fingerprint(model)
        for key in (*FIXED_SETTINGS, *OPTIONAL_SETTINGS):
            saved, here = (of.get(key, OPTIONAL_SETTINGS.get(key)) for of in (self.settings, settings))
            if here != saved:
                raise ValueError(
                    f"the state was saved with {key}={saved!r}, this model has {key}={here!r}: set it to that"
                )
        if self.dtype != str(model.dtype):
            raise ValueError(f"the state is of a {self.dtype} model, this one is {model.dtype}: load it in that dtype")
        if self.fingerprint != digest:
            raise ValueError(
                f"the state was saved by another model (fingerprint {self.fingerprint[:12]}, this one is "
                f"{digest[:12]}): fast weights mean nothing to a model with other weights. Save the model beside its "
                "states, model.save_pretrained(folder), with only_sleep=True its fast-weight blocks alone, and load "
                "it with AutoModelForSleepLM.from_pretrained(folder)"
            )
        self._check_fits(model, config)
        cache = SleepCache()
        cache.hold(model, _unnamed(self.tensors, tuple(self.rows), self.columns, model))
        return cache

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all; load it with `SleepState.load`.

        Raises:
            ValueError: what could not be loaded again: values that are not finite, counters that cannot be.
        """
        write_file(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of a file, as `save` writes it and `from_bytes` reads it.

        Raises:
            ValueError: as `save`.
        """
        self._check()
        header = {key: getattr(self, key) for key in HEADER} | {"rows": [dataclasses.asdict(row) for row in self.rows]}
        metadata = {"format": FORMAT, "version": __version__, "state": json.dumps(header), "sha256": NO_DIGEST}
        if self.about is not None:
            metadata |= {"format": FORMAT_WITH_ABOUT, "about": json.dumps(self.about)}
        tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in self.tensors.items()}
        data = save(tensors, metadata)
        at = data.index(f'"{NO_DIGEST}"'.encode()) + 1
        return b"".join((data[:at], _digest(data, at).encode(), data[at + len(NO_DIGEST) :]))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SleepState":
        """Read what `save` wrote. A file of hf_sleep's first format loads with a warning: damage in it may not show.

        Raises:
            ValueError: a file that is not a sleep state, is damaged, or is of a newer hf_sleep.
        """
        with Path(path).open("rb") as file:
            return cls._of_file(str(path), file)

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "the file") -> "SleepState":
        """Read what `to_bytes` made.

        Args:
            data: the content of a file.
            name: what errors call it.

        Raises:
            ValueError: as `load`.
        """
        return cls._of_file(name, io.BytesIO(data))

    @classmethod
    def _of_file(cls, path: str, file: BinaryIO) -> "SleepState":
        header, tensors, about = _read(path, file)
        try:
            if header.keys() != HEADER.keys() or any(type(header[key]) is not kind for key, kind in HEADER.items()):
                raise ValueError(f"its header is {reprlib.repr(header)}, it must have {', '.join(HEADER)}")
            rows = [_row(values, header["columns"]) for values in header["rows"]]
            state = cls(tensors, **header | {"rows": rows}, about=about)
            state._check()
        except ValueError as error:
            raise ValueError(f"{path} is no sleep state: {error}") from error
        return state

    def _check(self) -> SleepConfig:
        """Check all that can be checked without a model, and return how it slept."""
        if self.settings.keys() - OPTIONAL_SETTINGS.keys() != set(FIXED_SETTINGS):
            raise ValueError(
                f"its settings are {reprlib.repr(self.settings)}, they must be {', '.join(FIXED_SETTINGS)}"
            )
        config = SleepConfig(**self.settings)
        for number, row in enumerate(self.rows):
            _check_row(number, row, config)
        longest = max((row.seen for row in self.rows), default=None)
        if longest is None or type(self.columns) is not int or self.columns < longest:
            raise ValueError(
                f"columns={self.columns!r} with {longest} tokens in the longest row: tokens are in columns"
            )
        for name, t in self.tensors.items():
            if t.dtype not in DTYPES or t.dim() < 3 or len(t) != len(self.rows):
                raise ValueError(
                    f"{name} is {_described(t)}: it must hold floating-point values of {len(self.rows)} rows"
                )
            if not bool(t.isfinite().all()):
                raise ValueError(f"{name} holds values that are not finite (NaN or infinite)")
        return config

    def _check_fits(self, model: Any, config: SleepConfig) -> None:
        """Check that the tensors are such as `model` carries, from what it carries after one token."""
        with torch.no_grad():
            ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            like = dict(_named(model(ids, use_cache=True).cache.memory))
        fast_slots, size, held = model.fast_slots(), config.window_size, max(row.kv_length for row in self.rows)
        kv = {name for name in like if name.startswith("layers.") and int(name.split(".")[1]) not in fast_slots}
        # How many tokens may stand in dimension -2, stale ones of a longer row among them.
        widths = dict.fromkeys(kv, (held, config.make_eviction().most_retained + size))
        for name in ("hidden", "loop_input"):
            widths[name] = max(row.fill for row in self.rows), size
        absent = {name for name, (least, _) in widths.items() if not least}
        if kv & self.tensors.keys():
            absent -= kv
        if missing := sorted(like.keys() - self.tensors.keys() - absent):
            raise ValueError(f"the state lacks {', '.join(missing[:3])}, which this model carries")
        if extra := sorted(self.tensors.keys() - like.keys()):
            raise ValueError(f"the state has {', '.join(extra[:3])}, which this model does not carry")
        # Recurrent states keep their dtype; under autocast the others are some in one dtype and some in the other.
        recurrent = {name for name in like.keys() - kv if name.endswith(".0")}
        others = {model.dtype, *(like[name].dtype for name in like.keys() - recurrent)}
        for name, t in self.tensors.items():
            shape, dtypes = [len(self.rows), *like[name].shape[1:]], {like[name].dtype} if name in recurrent else others
            least, most = widths.get(name, (shape[-2], shape[-2]))
            shape[-2] = min(max(t.shape[-2], least), most)
            if list(t.shape) != shape or t.dtype not in dtypes:
                known = " or ".join(sorted(map(str, dtypes)))
                raise ValueError(f"the state's {name} is {_described(t)}, where this model carries {shape} of {known}")

    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def __repr__(self) -> str:
        seen, sleeps = (reprlib.repr([getattr(row, name) for row in self.rows]) for name in ("seen", "sleeps"))
        return (
            f"SleepState(rows={len(self.rows)}, tokens={seen}, sleeps={sleeps}, bytes={self.num_bytes()}, "
            f"window_size={self.settings.get('window_size')}, eviction={self.settings.get('eviction')!r}, "
            f"dtype={self.dtype}, fingerprint={self.fingerprint[:12]})"
        )


def _read(path: str, file: BinaryIO) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any] | None]:
    """A file's header, tensors and what it says about them, as they were written."""
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise ValueError(f"{path} is no sleep state: it is not a safetensors file (a header of {length} bytes)")
    metadata = _parse(path, file.read(length)).get("__metadata__")
    metadata = metadata if isinstance(metadata, dict) else {}
    found = metadata.get("format")
    if not isinstance(found, str) or not re.fullmatch(r"hf_sleep\.state\.v[1-9][0-9]*", found):
        raise ValueError(f"{path} is no sleep state: its format is {found!r}, {FORMAT!r} works")
    file.seek(0)
    data = file.read()
    if found != FIRST_FORMAT:
        digest = str(metadata.get("sha256"))
        at = data.find(f'"{digest}"'.encode(errors="replace"), 8, 8 + length) + 1
        if not at or _digest(data, at) != digest:
            raise ValueError(
                f"{path} is damaged: its bytes are not those that were saved (SHA-256). Get it again, or save it again"
            )
    if found not in FORMATS:
        raise NewerFormatError(
            f"{path} has the format {found!r} of hf_sleep {metadata.get('version')}, which hf_sleep {__version__} "
            "cannot read: upgrade hf_sleep"
        )
    if metadata.keys() != FORMATS[found]:
        raise ValueError(f"{path} is damaged: {found!r} has {sorted(FORMATS[found])}, this file {sorted(metadata)}")
    try:
        tensors = load(data)
    except (SafetensorError, KeyError) as error:  # a KeyError: of a dtype that torch does not have
        raise ValueError(f"{path} is damaged: it is not a whole safetensors file ({error})") from error
    if found == FIRST_FORMAT:
        message = f"{path} is of hf_sleep's first format and carries no digest, so damage to it may not show"
        warnings.warn(f"{message}: load it and save it again", stacklevel=4)
    about = _parse(path, metadata["about"]) if found == FORMAT_WITH_ABOUT else None
    return _parse(path, metadata["state"]), tensors, about


def _parse(path: str, text: str | bytes) -> dict[str, Any]:
    """A JSON object, of whatever depth."""
    try:
        value = json.loads(text.decode() if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no sleep state: its header is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no sleep state: its header is a JSON {type(value).__name__}, not an object")
    return value


def _digest(data: bytes, at: int) -> str:
    """SHA-256 of a whole file, with `NO_DIGEST` where it is written itself, at byte `at`."""
    view, digest = memoryview(data), hashlib.sha256()
    for part in (view[:at], NO_DIGEST.encode(), view[at + len(NO_DIGEST) :]):
        digest.update(part)
    return digest.hexdigest()


def _check_row(number: int, row: Counters, config: SleepConfig) -> None:
    """Check a row's counters: where it retains and where it stands follow from what it read and slept on."""
    size, fits = config.window_size, False
    if all(type(getattr(row, name)) is int for name in COUNTERS):
        slept_on = row.seen - row.fill
        # A sleep takes one token at least, and a window at most.
        fits = 0 <= row.fill <= size and -(-slept_on // size) <= row.sleeps <= slept_on
        fits &= config.make_eviction().may_leave(row)
    if not fits:
        raise ValueError(
            f"row {number} has {row}, which window_size={size}, eviction={config.eviction!r} and "
            f"num_sink_tokens={config.num_sink_tokens} cannot leave"
        )


def _row(values: Any, columns: int) -> Counters:
    """A row's counters, of a header. The first format says only by its counts whether there were pads."""
    if type(values) is not dict or values.keys() - {"pads"} != set(COUNTERS):
        raise ValueError(f"a row is {reprlib.repr(values)}: it must have {', '.join(COUNTERS)}")
    pads = values.get("pads", 0 if values["seen"] == columns else None)
    if pads is not None and (type(pads) is not int or not 0 <= pads < 2**64):
        raise ValueError(f"a row has pads={reprlib.repr(pads)}: it must be an integer of 64 bits, or null")
    return Counters(**values | {"pads": pads})


def _described(t: torch.Tensor) -> str:
    return f"{list(t.shape)} of {t.dtype}"


def _settings(model: Any) -> dict[str, Any]:
    plain = model.config.sleep.to_dict()
    optional = {key for key, usual in OPTIONAL_SETTINGS.items() if plain[key] != usual}
    return {key: plain[key] for key in (*FIXED_SETTINGS, *optional)}


def _named(memory: Memory) -> list[tuple[str, torch.Tensor]]:
    """All tensors by their names on disk, where `loop_output` is called `hidden`."""
    named = []
    for prefix, pairs in (("layers", dict(enumerate(memory.carried))), ("window_start", memory.window_start)):
        for slot, pair in pairs.items():
            named += [(f"{prefix}.{slot}.{i}", t) for i, t in enumerate(pair or ())]
    whole = (("hidden", memory.loop_output), ("loop_input", memory.loop_input))
    return [*named, *((name, t) for name, t in whole if t is not None)]


def _unnamed(named: dict[str, torch.Tensor], rows: tuple[Counters, ...], columns: int, model: Any) -> Memory:
    devices, fast_slots = model.slot_devices(), model.fast_slots()

    def pair(prefix: str, slot: int) -> Any:
        tensors = [named[name].to(devices[slot]) for i in (0, 1) if (name := f"{prefix}.{slot}.{i}") in named]
        return (FastWeights if slot in fast_slots else KV)(*tensors) if tensors else None

    def whole(name: str) -> torch.Tensor | None:
        return named[name].to(devices[0]) if name in named else None

    carried = tuple(pair("layers", slot) for slot in range(len(devices)))
    start = {slot: p for slot in range(len(devices)) if (p := pair("window_start", slot)) is not None}
    return Memory(rows, carried, start, whole("hidden"), whole("loop_input"), columns)
