"""Evaluation: what a memory gives back of a text, by position and by questions, beside what there is to be had."""

from .answers import Score, judge, measure, problems
from .forgetting import Forgetting, forgetting
from .position import PositionLosses, loss_by_position, losses_asleep, losses_of_base
from .report import by_difficulty, lines_of, table

__all__ = [
    "Forgetting",
    "PositionLosses",
    "Score",
    "by_difficulty",
    "forgetting",
    "judge",
    "lines_of",
    "loss_by_position",
    "losses_asleep",
    "losses_of_base",
    "measure",
    "problems",
    "table",
]
