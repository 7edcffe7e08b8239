"""Synthetic tasks with known answers, to train and to measure sleep on, and rows of plain text."""

from .depo import Depo
from .facts import Facts
from .gsm_infinite import GSMInfinite
from .khop import KHop, KHopText
from .long_text import LongText
from .managers import Managers
from .mqar import MQAR
from .needle import Needle
from .rule110 import Rule110
from .ruler import RULER
from .task import Task
from .text import Text, TextRows
from .variables import VariableTracking
from .word_counts import CommonWords, FrequentWords

__all__ = [
    "MQAR",
    "RULER",
    "CommonWords",
    "Depo",
    "Facts",
    "FrequentWords",
    "GSMInfinite",
    "KHop",
    "KHopText",
    "LongText",
    "Managers",
    "Needle",
    "Rule110",
    "Task",
    "Text",
    "TextRows",
    "VariableTracking",
]
