"""Synthetic tasks with known answers, to train and to measure sleep on."""

from .depo import Depo
from .gsm_infinite import GSMInfinite
from .khop import KHop, KHopText
from .long_text import LongText
from .managers import Managers
from .rule110 import Rule110
from .task import Task

__all__ = ["Depo", "GSMInfinite", "KHop", "KHopText", "LongText", "Managers", "Rule110", "Task"]
