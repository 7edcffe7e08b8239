"""Fast-weight blocks, and the mixers that this package brings."""

from .block import FastWeightBlock, FastWeightMixer
from .gated_delta_net import GatedDeltaNet
from .jet import Jet

__all__ = ["FastWeightBlock", "FastWeightMixer", "GatedDeltaNet", "Jet"]
