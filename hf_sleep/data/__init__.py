"""Synthetic tasks with known answers, to train and to measure sleep on."""

from .depo import Depo
from .facts import Facts
from .gsm_infinite import GSMInfinite
from .khop import KHop, KHopText
from .managers import Managers
from .mqar import MQAR
from .rule110 import Rule110
from .task import Task

__all__ = ["MQAR", "Depo", "Facts", "GSMInfinite", "KHop", "KHopText", "Managers", "Rule110", "Task"]
