"""Registries of what can be added from outside the package, by name: base families, blocks, evictions, pass policies,
and what happens between passes.

Nothing here needs torch, so that a name can be checked and listed without it.
"""

import importlib
import sys
from collections.abc import Callable
from typing import Any, TypeVar

C = TypeVar("C", bound=type)


class Registry:
    """Classes by name, on one axis.

    Args:
        axis: what the classes are, in words, for errors: `"eviction"`.
        home: the module that defines this package's own ones; it is imported when a name is first asked for.
        decorator: name of the public function that registers one, for errors.
    """

    def __init__(self, axis: str, home: str, decorator: str):
        self.axis, self.home, self.decorator = axis, home, decorator
        self._classes: dict[str, type] = {}
        self._is_loaded = False

    def _load(self) -> None:
        """Import this package's own classes."""
        if not self._is_loaded:
            importlib.import_module(self.home)
            self._is_loaded = True

    def register(self, *names: str) -> Callable[[C], C]:
        """Decorate a class, which can then be asked for by each of `names`.

        Registering a class again under its own name, as a notebook's cell does that is run twice, replaces it.

        Raises:
            TypeError: no name, as of a decorator without parentheses.
            ValueError: a name that another class has.
        """

        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError(f"@{self.decorator} needs a name: @{self.decorator}('name')")

        def add(new: C) -> C:
            for name in names:
                old = self._classes.get(name)
                if old is not None and not _is_same(old, new):
                    raise ValueError(
                        f"{self.decorator}({name!r}): {old.__module__}.{old.__qualname__} has that name already, "
                        "choose another (or import the file just once: run as a script and imported, it is two modules)"
                    )
            for name in names:
                self._classes[name] = new
            return new

        return add

    def names(self) -> list[str]:
        """All names, sorted."""
        self._load()
        return sorted(self._classes)

    def __contains__(self, name: object) -> bool:
        self._load()
        return isinstance(name, str) and name in self._classes

    def __getitem__(self, name: str) -> Any:
        """The class of that name.

        Raises:
            ValueError: there is none.
        """
        if name not in self:
            raise ValueError(f"{self.axis} {name!r} is not known: {self.what_works()}")
        return self._classes[name]

    def name_of(self, kind: type) -> str | None:
        """The first name under which a class is registered; `None`: under none."""
        self._load()
        return next((name for name, known in self._classes.items() if _is_same(known, kind)), None)

    def module_of(self, name: str) -> str | None:
        """The module that has to be imported for a name; `None` for what this package brings, or an unknown name."""
        kind = self._classes.get(name)
        if kind is None or kind.__module__.partition(".")[0] == __package__:
            return None
        module = kind.__module__
        spec = getattr(sys.modules.get(module), "__spec__", None)
        return spec.name if module == "__main__" and spec is not None else module

    def what_works(self, module: str | None = None) -> str:
        """Say in an error what would work instead of a name that is not known.

        Args:
            module: the one that registered it where it was saved, if that is known.
        """
        if module == "__main__":
            return "it was registered by the script or notebook that saved it: run that definition here first"
        if module is not None:
            return f"it was registered by {module}, which has not been imported here: import {module} first"
        return f"it must be one of {', '.join(self.names())}, or be registered with hf_sleep.{self.decorator} first"


def _is_same(a: type, b: type) -> bool:
    """Whether two classes are one, or the second is the first run again."""
    return (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)


BASES = Registry("base family", "hf_sleep.bases", "register_base")
BLOCKS = Registry("block", "hf_sleep.layers", "register_block")
EVICTIONS = Registry("eviction", "hf_sleep.engine", "register_eviction")
PASS_POLICIES = Registry("pass policy", "hf_sleep.engine", "register_pass_policy")
BETWEEN = Registry("what happens between passes", "hf_sleep.engine", "register_between")

register_base = BASES.register
register_block = BLOCKS.register
register_eviction = EVICTIONS.register
register_pass_policy = PASS_POLICIES.register
register_between = BETWEEN.register
