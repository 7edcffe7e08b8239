"""Synthetic tasks with known answers, to train and to measure sleep on, and rows of plain text."""

from .depo import Depo
from .gsm_infinite import GSMInfinite
from .khop import KHop, KHopText
from .managers import Managers
from .rule110 import Rule110
from .task import Task
from .text import Text, TextRows

__all__ = ["Depo", "GSMInfinite", "KHop", "KHopText", "Managers", "Rule110", "Task", "Text", "TextRows"]
