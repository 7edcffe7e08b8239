"""Building blocks of the algorithm in `sleep.py`: slots, windows, buffers, evictions, passes, what is between them."""

from .between import Between, Gate, Nothing
from .eviction import Eviction, EvictionPlan, Hard, Sliding
from .passes import FixedPasses, PassPolicy, UntilSettled, WithinSeconds, pass_policy, policy_fields
from .slots import RunningOrder, Slot, run_slots, running_order
from .static import Buffers, can_step, has_room, read_token
from .watch import PassEvent, PassHook, SleepEvent, SleepHook, Watchers, of_cache
from .window import Read, Span, Window, require_masks

__all__ = [
    "Between",
    "Buffers",
    "Eviction",
    "EvictionPlan",
    "FixedPasses",
    "Gate",
    "Hard",
    "Nothing",
    "PassEvent",
    "PassHook",
    "PassPolicy",
    "Read",
    "RunningOrder",
    "SleepEvent",
    "SleepHook",
    "Sliding",
    "Slot",
    "Span",
    "UntilSettled",
    "Watchers",
    "Window",
    "WithinSeconds",
    "can_step",
    "has_room",
    "of_cache",
    "pass_policy",
    "policy_fields",
    "read_token",
    "require_masks",
    "run_slots",
    "running_order",
]
