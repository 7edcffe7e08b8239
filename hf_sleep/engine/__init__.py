"""What the algorithm in `sleep.py` is made of: slots, windows, evictions, pass policies, what lies between passes."""

from .between import Between, Gate, Nothing
from .eviction import Eviction, EvictionPlan, Hard, Sliding
from .passes import FixedPasses, PassPolicy, UntilSettled, WithinSeconds, pass_policy, policy_fields
from .slots import RunningOrder, Slot, run_slots, running_order
from .watch import PassEvent, PassHook, SleepEvent, SleepHook, Watchers, in_this_thread
from .window import Read, Span, Window

__all__ = [
    "Between",
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
    "in_this_thread",
    "pass_policy",
    "policy_fields",
    "run_slots",
    "running_order",
]
