"""How many passes a sleep runs.

To add a policy, subclass `PassPolicy` as a frozen dataclass, say in `another` when to continue, and register it with
`@register_pass_policy("name")`, under which a checkpoint's config keeps it with its fields.
"""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from ..checks import reject, require_int
from ..registry import PASS_POLICIES, register_pass_policy

Written = Sequence[torch.Tensor]
"""What a pass left of one row: the fast weights `[H, K, V]` of every slot in the loop, in running order."""


class PassPolicy:
    """The contract: whether a sleep runs another pass over a window. The ordinary read was the first.

    Rows that sleep together are asked one by one, so what one of them does never depends on the others.
    """

    depends_on_data: ClassVar[bool] = True
    """Whether the answer depends on more than the number. Then ranks may disagree, which sharded weights forbid."""

    at_least: int = 1
    """Passes that every sleep runs. Above 1, reading leaves out what a second pass would have to do again."""

    at_most: int | None = None
    """Passes that no sleep exceeds, where that is known."""

    def begin(self) -> "PassPolicy":
        """Called when a sleep begins. A policy that keeps count of something returns a copy that does."""
        return self

    def continues(self, asked: "PassPolicy", number: int, before: Written | None, after: Written | None) -> bool:
        """Whether a sleep that began with `asked` runs another pass: `asked.another`, within this policy's bounds."""
        if number < self.at_least:
            return True
        return (self.at_most is None or number < self.at_most) and bool(asked.another(number, before, after))

    def to_dict(self) -> int | str | dict[str, Any]:
        """What a `GenerationConfig` that has it prints and saves: `policy_fields`, or where it has none its `repr`."""
        try:
            return policy_fields(self)
        except ValueError:
            return repr(self)

    def another(self, number: int, before: Written | None, after: Written | None) -> bool:
        """Whether a row needs a pass more.

        Args:
            number: passes so far, from 1.
            before: what the pass before the last one left; `None` after the ordinary read, whose start is not kept.
            after: what the last pass left. Both are `None` for a policy that does not depend on the data.
        """
        raise NotImplementedError


@register_pass_policy("fixed")
@dataclass(frozen=True)
class FixedPasses(PassPolicy):
    """N passes, as in the paper.

    Args:
        passes: N.

    Source: Lee et al. 2026 (arXiv 2605.26099), Alg. 1.
    """

    depends_on_data: ClassVar[bool] = False
    passes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "at_least", self.passes)
        object.__setattr__(self, "at_most", self.passes)

    def another(self, number: int, before: Written | None, after: Written | None) -> bool:
        return number < self.passes


@register_pass_policy("until_settled")
@dataclass(frozen=True)
class UntilSettled(PassPolicy):
    """Passes until one changes the fast weights by little.

    Args:
        cap: passes at most.
        tolerance: the change (`change`) at which a row has settled.
    """

    cap: int = 8
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        require_int("UntilSettled.cap", self.cap, 1)
        if not self.tolerance >= 0:
            raise reject("UntilSettled.tolerance", self.tolerance, "it must be 0 or more")
        object.__setattr__(self, "at_least", min(self.cap, 2))
        object.__setattr__(self, "at_most", self.cap)

    def another(self, number: int, before: Written | None, after: Written | None) -> bool:
        return change(before, after) > self.tolerance


@register_pass_policy("within_seconds")
@dataclass(frozen=True)
class WithinSeconds(PassPolicy):
    """As many passes as begin within a budget of time. Two runs may differ.

    Args:
        seconds: from the beginning of the sleep; the pass that crosses it is finished.
        cap: passes at most.
    """

    began: ClassVar[float] = math.inf
    seconds: float
    cap: int = 8

    def __post_init__(self) -> None:
        require_int("WithinSeconds.cap", self.cap, 1)
        if not self.seconds >= 0:
            raise reject("WithinSeconds.seconds", self.seconds, "it must be 0 or more")
        object.__setattr__(self, "at_most", self.cap)

    def begin(self) -> "WithinSeconds":
        begun = copy.copy(self)
        object.__setattr__(begun, "began", time.perf_counter())
        return begun

    def another(self, number: int, before: Written | None, after: Written | None) -> bool:
        if after and after[0].device.type != "cpu":
            torch.accelerator.synchronize(after[0].device)
        return time.perf_counter() - self.began < self.seconds


def change(before: Written | None, after: Written | None) -> float:
    """How far a pass moved a row's fast weights: Frobenius norm of the change over the norm, of all slots together."""
    if before is None or after is None:
        return math.inf
    moved = sum(float((new.detach() - old.detach()).square().sum()) for old, new in zip(before, after, strict=True))
    size = sum(float(new.detach().square().sum()) for new in after)
    return math.sqrt(moved / size) if size else 0.0


def pass_policy(passes: Any, name: str = "sleep_passes") -> PassPolicy:
    """The policy that a setting means.

    Args:
        passes: N, a policy, or what `policy_fields` made of one.
        name: of the setting, for errors.

    Raises:
        ValueError: anything else.
    """
    if isinstance(passes, PassPolicy):
        if passes.at_most is not None and passes.at_most < passes.at_least:
            raise reject(name, passes, f"its at_least={passes.at_least} is above its at_most={passes.at_most}")
        return passes
    if isinstance(passes, dict):
        fields = dict(passes)
        kind = fields.pop("policy", None)
        if kind not in PASS_POLICIES:
            raise reject(name, passes, PASS_POLICIES.what_works(fields.get("module")))
        fields.pop("module", None)
        try:
            return PASS_POLICIES[kind](**fields)
        except TypeError as error:
            raise reject(name, passes, f"{kind} does not take these fields ({error})") from error
    if type(passes) is not int or passes < 1:
        works = "it must be an integer of at least 1 (1 is the plain hybrid), or a PassPolicy"
        raise reject(name, passes, works) if "." in name else ValueError(f"{name}={passes!r}: {works}")
    return FixedPasses(passes)


def policy_fields(policy: PassPolicy) -> int | dict[str, Any]:
    """A policy as JSON-ready values, from which `pass_policy` makes it again; of a fixed number just that.

    Raises:
        ValueError: a policy that is no dataclass, or was not registered.
    """
    if isinstance(policy, FixedPasses):
        return policy.passes
    name, kind = PASS_POLICIES.name_of(type(policy)), type(policy)
    if name is None or not hasattr(kind, "__dataclass_fields__"):
        raise ValueError(
            f"{type(policy).__name__} cannot be saved: make it a frozen dataclass and register it with "
            "hf_sleep.register_pass_policy. As an argument of a call it works without"
        )
    values = {field.name: getattr(policy, field.name) for field in fields(kind) if field.init}  # type: ignore[arg-type]
    if taken := {"policy", "module"} & values.keys():
        raise ValueError(f"{kind.__name__} cannot be saved: a field is called {min(taken)!r}, give it another name")
    module = PASS_POLICIES.module_of(name)
    return {"policy": name, **({} if module is None else {"module": module}), **values}
