"""Checkpoints on the Hub: a card that writes itself, a file that points to this package, and the push."""

from .base import KNOWN_LICENCES, base_licence, hub_id
from .card import CardFacts, is_our_card, is_untrained, model_card, write_model_card
from .repository import (
    AUTO_MAP,
    REMOTE_CODE_FILE,
    TAGS,
    Repository,
    drop_older_weights,
    forget_folders,
    weight_files,
    write_remote_code,
)

__all__ = [
    "AUTO_MAP",
    "KNOWN_LICENCES",
    "REMOTE_CODE_FILE",
    "TAGS",
    "CardFacts",
    "Repository",
    "base_licence",
    "drop_older_weights",
    "forget_folders",
    "hub_id",
    "is_our_card",
    "is_untrained",
    "model_card",
    "weight_files",
    "write_model_card",
    "write_remote_code",
]
