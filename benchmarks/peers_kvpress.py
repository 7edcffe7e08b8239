"""Presses of kvpress beside the bare base, for peers.py, where kvpress and the transformers it needs can be loaded.

Reads a JSON object from stdin (`model`, `dtype`, `threads`, `ids`, `decode`, `turns`, `counted_apart`, `kept`,
`presses`), and writes one to stdout: releases, and what each took. Nothing of hf_sleep is imported, whose transformers
is another.
"""

import importlib.metadata
import importlib.util
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import kvpress
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

MEASURE = Path(__file__).resolve().parents[1] / "hf_sleep" / "cli" / "measure.py"


class Pressed:
    """A base whose KV cache is pressed to `kept` tokens once the text was read; `press=None`: the bare base.

    Args:
        press: a class of kvpress.
        kept: tokens of the text whose KV stays.
    """

    def __init__(self, lm, press=None, kept=0):
        self.lm, self.press, self.kept, self.read = lm, press, kept, 0
        self.cache, self.sleeps = DynamicCache(config=lm.config), []

    def __call__(self, ids):
        first, self.read = self.read, self.read + ids.shape[1]
        if first or self.press is None or ids.shape[1] <= self.kept:
            positions = torch.arange(first, self.read).unsqueeze(0)
            return self._logits(ids, position_ids=positions)
        ratio = 1 - (self.kept + 0.5) / ids.shape[1]  # it rounds what it keeps down
        with self.press(compression_ratio=ratio)(self.lm):
            return self._logits(ids)

    def _logits(self, ids, **how):
        return self.lm(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **how).logits

    def num_bytes(self):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


def load_measure():
    """The module that times hf-sleep bench, without the package around it."""
    spec = importlib.util.spec_from_file_location("measure", MEASURE)
    module = sys.modules["measure"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    asked = json.load(sys.stdin)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(asked["threads"])
    lm = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=asked["dtype"]).eval()
    readers = {"base": partial(Pressed, lm)}
    readers |= {name: partial(Pressed, lm, getattr(kvpress, name), asked["kept"]) for name in asked["presses"]}
    measured = load_measure().measure(
        readers, torch.tensor([asked["ids"]]), asked["decode"], asked["turns"], asked["counted_apart"]
    )
    releases = {name: importlib.metadata.version(name) for name in ("kvpress", "transformers", "torch")}
    json.dump({"releases": releases, "measured": {name: asdict(of) for name, of in measured.items()}}, sys.stdout)


if __name__ == "__main__":
    main()
