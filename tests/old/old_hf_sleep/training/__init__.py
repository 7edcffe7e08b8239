"""Training: an optimizer, a Trainer, callbacks and a collator; the plain `Trainer` works too."""

from .callbacks import (
    HardEvictionWarmup,
    NonFiniteGuard,
    SleepMonitor,
    SleepPassesSchedule,
    freeze_all_but_fast_weights,
)
from .collator import SleepCollator
from .evaluation import GenerationEvaluation
from .optimizer import MuonAdamW, parameter_groups
from .trainer import SleepTrainer, SleepTrainingArguments

__all__ = [
    "GenerationEvaluation",
    "HardEvictionWarmup",
    "MuonAdamW",
    "NonFiniteGuard",
    "SleepCollator",
    "SleepMonitor",
    "SleepPassesSchedule",
    "SleepTrainer",
    "SleepTrainingArguments",
    "freeze_all_but_fast_weights",
    "parameter_groups",
]
