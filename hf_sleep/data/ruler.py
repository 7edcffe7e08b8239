"""RULER's tasks by their names there, each a class and its settings."""

from typing import Any

from .long_text import LongText
from .needle import Needle
from .variables import VariableTracking
from .word_counts import CommonWords, FrequentWords

RULER: dict[str, tuple[type[LongText], dict[str, Any]]] = {
    "niah_single_1": (Needle, {"haystack": "noise"}),
    "niah_single_2": (Needle, {}),
    "niah_single_3": (Needle, {"value_kind": "uuids"}),
    "niah_multikey_1": (Needle, {"keys": 4}),
    "niah_multikey_2": (Needle, {"haystack": "needles"}),
    "niah_multikey_3": (Needle, {"haystack": "needles", "key_kind": "uuids", "value_kind": "uuids"}),
    "niah_multivalue": (Needle, {"values": 4}),
    "niah_multiquery": (Needle, {"keys": 4, "queries": 4}),
    "vt": (VariableTracking, {"haystack": "noise"}),
    "cwe": (CommonWords, {}),
    "fwe": (FrequentWords, {}),
}
"""Eleven of the thirteen: `task, settings = RULER[name]; task(tokenizer, windows, window_size, **settings)`.

Where theirs hide needles in essays, these draw sentences: give `haystack` a text of your own. The other two ask about
data sets of questions, which are not generated.

Source: Hsieh et al. 2024, RULER (arXiv 2404.06654), its `synthetic.yaml`.
"""
