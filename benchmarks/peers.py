"""What it costs to read a text and to decode after it, beside what people would use instead.

    python benchmarks/peers.py --install-kvpress     once: kvpress and the transformers it needs, into .versions
    python benchmarks/peers.py                       2,048 and 8,192 tokens
    python benchmarks/peers.py --tokens 32768 --once --json peers.json --plot peers.png     half an hour

One model, one text: the bare base with its full KV cache, StreamingLLM, presses of kvpress, and ours with hard and with
sliding eviction, N = 1, 2, 4. All but the base hold as many bytes as ours with hard eviction at a full window. Of
sliding eviction the window is half as long, since it keeps another window's KV.

Each reads the text whole, then all decode in turns, token by token. kvpress needs an older transformers, so its presses
run in a process of their own, with a bare base beside them: every ratio is one to the base in the same process. Bytes
are those of live tensors, weights left out, counted in a reading of their own, or with --once in the timed one. Blocks
are untrained: the cost is that of trained ones, and nothing is said about what is remembered.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import transformers
from report import console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from hf_sleep import SleepConfig, SleepForCausalLM, default_dtype
from hf_sleep.cli.measure import measure
from hf_sleep.cli.readers import FullCache, Sleeping, StreamingLLM
from hf_sleep.info import describe

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / ".demo" / "SmolLM2-135M-Instruct"
OVERLAY = ROOT / ".versions" / "kvpress"
# What kvpress 0.5.5 asks for and the locked environment has in no release that suits it. Its pandas<3 is left out: of
# that package it imports nothing.
PINNED = (
    *("kvpress==0.5.5", "transformers==5.2.0", "huggingface_hub==1.33.0", "tokenizers==0.22.2", "cachetools==5.5.2"),
    *("fire==0.6.0", "six==1.17.0", "termcolor==3.3.0", "httpx==0.28.1", "httpcore==1.0.9", "typer-slim==0.24.0"),
)
PRESSES = ("StreamingLLMPress", "SnapKVPress", "KnormPress")
PASSES = (1, 2, 4)
WINDOW = 512
NOT_THERE = "kvpress is not installed, so it is not measured: python benchmarks/peers.py --install-kvpress"
COLUMNS = (
    ("read_tokens_per_second", "read, tokens/s", "{:,.0f}", 1),
    ("first_token_seconds", "first token, s", "{:.2f}", 1),
    ("decode_ms_per_token", "decode, ms", "{:.1f}", 1),
    ("seconds_per_sleep", "a sleep, s", "{:.2f}", 1),
    ("bytes_held", "held, MB", "{:.1f}", 1e6),
    ("peak_bytes", "peak, MB", "{:.0f}", 1e6),
)


def install() -> None:
    """Lay the pinned releases into a folder of their own; the environment stays as it is."""
    partial_folder = OVERLAY.with_suffix(".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q"]
    subprocess.run([*pip, "install", "--no-deps", "--target", str(partial_folder), *PINNED], check=True)
    shutil.rmtree(OVERLAY, ignore_errors=True)
    partial_folder.rename(OVERLAY)
    console.print(f"installed into {OVERLAY}: {', '.join(PINNED)}")


def is_installed() -> bool:
    """Tell whether the folder holds the pinned releases."""
    found = importlib.metadata.distributions(path=[str(OVERLAY)]) if OVERLAY.is_dir() else ()
    held = {f"{package.name}=={package.version}".replace("-", "_").lower() for package in found}
    return {pin.replace("-", "_").lower() for pin in PINNED} <= held


def text_ids(tokenizer, tokens: int) -> list[int]:
    """The first `tokens` ids of this repository's own pages, again from the first where they are too few."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    ids = tokenizer("\n\n".join(page.read_text(encoding="utf-8") for page in pages)).input_ids
    return (ids * -(-tokens // len(ids)))[:tokens]


def ours(base: PreTrainedModel, passes: tuple[int, ...]) -> tuple[dict, int]:
    """Ours by name, and the tokens whose KV fills as many bytes as hard eviction holds at most."""
    hard = SleepForCausalLM.from_base(base, SleepConfig(window_size=WINDOW)).eval()
    sliding = SleepConfig(window_size=WINDOW // 2, eviction="sliding", num_sink_tokens=4)
    models = {"hard": hard, "sliding": SleepForCausalLM.from_base(base, sliding).eval()}
    readers = {
        f"ours, {eviction}, N = {n}": partial(Sleeping, model, n) for eviction, model in models.items() for n in passes
    }
    held = describe(hard.config, dtype=hard.dtype)
    return readers, held.num_bytes // held.kv_bytes_per_token


def of_kvpress(model: str, ids: list[int], kept: int, options: argparse.Namespace) -> dict:
    """What kvpress's presses took in a process of their own, and the bare base there."""
    asked = {
        "model": model,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "ids": ids,
        "kept": kept,
    }
    asked |= {"decode": options.decode, "turns": options.turns, "counted_apart": not options.once}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "peers_kvpress.py")],
        input=json.dumps(asked | {"presses": options.presses}),
        env={**os.environ, "PYTHONPATH": str(OVERLAY), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit("the process of kvpress failed, as said above: leave it out with --presses (without a name)")
    return json.loads(done.stdout)


def rows_of(measured: dict[str, dict], process: str, prefix: str = "") -> list[dict]:
    """A row a reader, with its ratios to the base in the same process."""
    base, rows = measured["base"], []
    for name, of in measured.items():
        shown = f"base, in {process}'s process" if name == "base" and prefix else prefix + name
        ratios = {key: value / base[key] for key, value in of.items() if value is not None and base[key]}
        rows.append({"who": shown, "process": process, **of, "ratio": ratios})
    return rows


def compare(base: PreTrainedModel, model: str, tokenizer, options: argparse.Namespace) -> dict:
    """All rows, length by length, printed as they come."""
    readers, kept = ours(base, tuple(options.passes))
    readers = {"base": partial(FullCache, base), "StreamingLLM": partial(StreamingLLM, base, kept), **readers}
    has_kvpress = bool(options.presses) and is_installed()
    if options.presses and not has_kvpress:
        console.print(NOT_THERE)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    found: dict = {
        "model": Path(model).name,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }
    found |= {"window": WINDOW, "kept": kept, "decoded": options.decode}
    found |= {"lengths": []}
    for tokens in options.tokens:
        ids = text_ids(tokenizer, tokens)
        theirs = of_kvpress(model, ids, kept, options) if has_kvpress else None
        took = measure(readers, torch.tensor([ids]), options.decode, options.turns, not options.once)
        rows = rows_of({name: asdict(of) for name, of in took.items()}, "ours")
        if theirs:
            rows += rows_of(theirs["measured"], "kvpress", "kvpress ")
        beside = theirs["releases"] if theirs else NOT_THERE if options.presses else "not asked for"
        found["lengths"].append({"tokens": tokens, "turns": options.turns, "once": options.once, "kvpress": beside})
        found["lengths"][-1]["rows"] = rows
        console.print(table(tokens, rows))
    return found


def with_other_lengths(found: dict, path: Path) -> dict:
    """The figures with those of other lengths that the file holds already.

    Raises:
        SystemExit: a file whose lengths were measured otherwise.
    """
    if not path.exists():
        return found
    before = json.loads(path.read_text(encoding="utf-8"))
    if differ := [key for key in found if key != "lengths" and found[key] != before[key]]:
        raise SystemExit(f"{path} was measured with other {', '.join(differ)}: give another file")
    measured = {length["tokens"]: length for length in before["lengths"] + found["lengths"]}
    return found | {"lengths": [measured[tokens] for tokens in sorted(measured)]}


def table(tokens: int, rows: list[dict]) -> Table:
    shown = Table(title=f"{tokens:,} tokens; in brackets: ÷ the base in the same process", box=None)
    shown.add_column("")
    for _, label, *_ in COLUMNS:
        shown.add_column(label, justify="right")
    for row in rows:
        shown.add_row(row["who"], *cells(row))
    return shown


def cells(row: dict) -> list[str]:
    texts = []
    for key, _, form, unit in COLUMNS:
        text = "-" if row[key] is None else form.format(row[key] / unit)
        is_base = row["who"].startswith("base")
        texts.append(text if is_base or key not in row["ratio"] else f"{text} ({row['ratio'][key]:.2f})")
    return texts


def plot(found: dict, path: Path) -> None:
    """Cost against length; kvpress by its ratios to its own base, times the base that is drawn."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    panels = (
        ("first_token_seconds", "time to first token, s", 1),
        ("decode_ms_per_token", "decode, ms a token", 1),
        ("bytes_held", "held after reading, MB", 1e6),
        ("peak_bytes", "peak of live tensors while reading, MB", 1e6),
    )
    lengths = [length["tokens"] for length in found["lengths"]]
    by_name: dict[str, list[dict]] = {}
    for length in found["lengths"]:
        base = length["rows"][0]
        for row in length["rows"]:
            scaled = {"tokens": length["tokens"]} | {key: row["ratio"][key] * base[key] for key, *_ in panels}
            by_name.setdefault(row["who"], []).append(scaled)
    names = [name for name in by_name if not name.startswith("base,")]
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.5), sharex=True)
    for axis, (key, label, unit) in zip(axes.flat, panels, strict=True):
        for name in names:
            at = [row["tokens"] for row in by_name[name]]
            axis.plot(at, [row[key] / unit for row in by_name[name]], label=name, **style(name))
        axis.set(xscale="log", yscale="log", title=label, xticks=lengths)
        axis.set_xticklabels([f"{tokens:,}" for tokens in lengths])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("tokens read")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=110)


def style(name: str) -> dict:
    """A colour a family, a marker a member."""
    if name == "base":
        return {"color": "black", "marker": "o", "linewidth": 2}
    if name == "StreamingLLM":
        return {"color": "tab:green", "marker": "s"}
    if name.startswith("kvpress"):
        marker = dict(zip(PRESSES, "v^x", strict=True)).get(name.removeprefix("kvpress "), "*")
        return {"color": "tab:orange", "marker": marker, "linestyle": "--"}
    shade = {"1": 0.45, "2": 0.7}.get(name[-1], 1.0)
    return {"color": "tab:blue" if "hard" in name else "tab:purple", "alpha": shade, "marker": f"${name[-1]}$"}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--install-kvpress", action="store_true", help="install kvpress into .versions/kvpress, and end")
    made.add_argument("--model", default=str(DEMO), help="Hub id or folder (default: what make demo unpacked)")
    native = str(default_dtype("cpu")).removeprefix("torch.")
    made.add_argument("--dtype", default=native, help="of the model (default here: %(default)s)")
    made.add_argument(
        "--tokens", type=int, nargs="*", default=[2048, 8192], metavar="T", help="to read; none: draw --json"
    )
    made.add_argument("--decode", type=int, default=32, metavar="T", help="to decode after them (%(default)s)")
    made.add_argument("--turns", type=int, default=1, help="readings, of which the median counts (%(default)s)")
    made.add_argument("--once", action="store_true", help="count bytes in the last timed reading; for long texts")
    made.add_argument("--passes", type=int, nargs="*", default=list(PASSES), metavar="N", help="of ours (%(default)s)")
    made.add_argument("--presses", nargs="*", default=list(PRESSES), help="of kvpress (%(default)s)")
    made.add_argument("--json", type=Path, help="write the figures here, beside those of other lengths")
    made.add_argument("--plot", type=Path, help="draw cost against length into this file")
    return made


def in_short(base: PreTrainedModel, quick: bool) -> None:
    """The part that `make bench` shows, on a model that is loaded already."""
    model = base.config.name_or_path
    asked = ["--model", model, "--dtype", str(base.dtype).removeprefix("torch."), "--presses", "SnapKVPress"]
    asked += ["--tokens", "1024", "--decode", "4"] if quick else ["--tokens", "2048"]
    passes = ["--passes", "1", *([] if quick else ["2"])]
    compare(base, model, AutoTokenizer.from_pretrained(model), parser().parse_args(asked + passes))


def main() -> None:
    options = parser().parse_args()
    if options.install_kvpress:
        install()
        return
    if options.tokens:
        found = measured(options)
    elif options.json and options.json.exists():
        found = json.loads(options.json.read_text(encoding="utf-8"))
    else:
        raise SystemExit("--tokens without a number draws what --json FILE holds: name one that is there")
    if options.plot:
        plot(found, options.plot)


def measured(options: argparse.Namespace) -> dict:
    """What is asked for, and what of other lengths the file holds already."""
    if options.model == str(DEMO) and not DEMO.is_dir():
        raise SystemExit(f"{DEMO} is missing: run `make demo` once, or pass --model with a Hub id or folder")
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    logging.set_verbosity_error()  # of texts longer than the model was trained on
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).eval()
    torch.manual_seed(0)
    found = compare(base, options.model, tokenizer, options)
    if options.json:
        found = with_other_lengths(found, options.json)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
