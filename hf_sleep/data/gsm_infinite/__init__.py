"""GSM-Infinite: remember a long text of quantities, then work out the one that is asked for."""

from .graph import MODES, draw_graph, majority
from .task import NOISES, GSMInfinite
from .text import Problem
from .words import TEMPLATES

__all__ = ["MODES", "NOISES", "TEMPLATES", "GSMInfinite", "Problem", "draw_graph", "majority"]
