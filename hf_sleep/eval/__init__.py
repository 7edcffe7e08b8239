"""Evaluation: what a memory gives back of a text, by position and by questions, beside what there is to be had."""

from .answers import Score, judge, measure, problems
from .position import PositionLosses, loss_by_position
from .report import by_difficulty, lines_of, table

__all__ = [
    "PositionLosses",
    "Score",
    "by_difficulty",
    "judge",
    "lines_of",
    "loss_by_position",
    "measure",
    "problems",
    "table",
]
