"""Training: an optimizer, a Trainer, callbacks and a collator; the plain `Trainer` works too."""

from .collator import SleepCollator
from .distillation import Distillation, DistillationTrainer, Teacher
from .evaluation import GenerationEvaluation
from .guard import NonFiniteGuard
from .monitor import SleepMonitor
from .optimizer import MuonAdamW, parameter_groups
from .parameters import freeze_all_but_fast_weights
from .schedules import DuringStep, HardEvictionWarmup, SleepPassesSchedule
from .spikes import SpikeGuard
from .trainer import SleepTrainer, SleepTrainingArguments
from .windows import WindowsCurriculum

__all__ = [
    "Distillation",
    "DistillationTrainer",
    "DuringStep",
    "GenerationEvaluation",
    "HardEvictionWarmup",
    "MuonAdamW",
    "NonFiniteGuard",
    "SleepCollator",
    "SleepMonitor",
    "SleepPassesSchedule",
    "SleepTrainer",
    "SleepTrainingArguments",
    "SpikeGuard",
    "Teacher",
    "WindowsCurriculum",
    "freeze_all_but_fast_weights",
    "parameter_groups",
]
