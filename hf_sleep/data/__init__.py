"""Synthetic tasks with known answers, to train and to measure sleep on."""

from .depo import Depo
from .gsm_infinite import GSMInfinite
from .khop import KHop
from .managers import Managers
from .rule110 import Rule110
from .task import Task

__all__ = ["Depo", "GSMInfinite", "KHop", "Managers", "Rule110", "Task"]
