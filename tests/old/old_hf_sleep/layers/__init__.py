from .block import FastWeightBlock
from .gated_delta_net import GatedDeltaNet
from .jet import Jet

__all__ = ["FastWeightBlock", "GatedDeltaNet", "Jet"]
