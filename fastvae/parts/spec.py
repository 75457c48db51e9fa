"""How a part describes itself, so that a model can be saved as JSON and built again.

A part's spec is its registered name and the arguments it was made with. The user's own modules
have none: they are recorded as custom and handed to `VAE.from_pretrained` by the user.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from fastvae.errors import UserError

PartClass = TypeVar("PartClass", bound=type[nn.Module])

CUSTOM = "custom"

_REGISTRY: dict[str, dict[str, type[nn.Module]]] = {}


def part(kind: str, name: str) -> Callable[[PartClass], PartClass]:
    """Class decorator: register the class as the `kind` ("encoder", …) called `name`.

    The class has an `__init__` of its own, whose arguments are numbers, strings and tuples.
    """

    def register(cls: PartClass) -> PartClass:
        signature = inspect.signature(cls.__init__)
        initialize = cls.__init__

        @functools.wraps(initialize)
        def remember(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            arguments = {k: v for k, v in bound.arguments.items() if k != "self"}
            initialize(self, *args, **kwargs)
            self.spec = {"name": name, **arguments}  # type: ignore[assignment]

        cls.__init__ = remember  # type: ignore[method-assign]
        _REGISTRY.setdefault(kind, {})[name] = cls
        return cls

    return register


def spec_of(module: nn.Module) -> dict[str, Any]:
    """The spec of a registered part, or a note of what a custom module was."""
    # A subclass of a registered part is another part: its spec would build the wrong one.
    if any(type(module) in parts.values() for parts in _REGISTRY.values()):
        return module.spec  # type: ignore[return-value]
    return {"name": CUSTOM, "class": f"{type(module).__module__}.{type(module).__qualname__}"}


def build_part(kind: str, spec: dict[str, Any]) -> nn.Module:
    """Make the part a spec describes. Raises UserError for unknown names and arguments."""
    arguments = dict(spec)
    name = arguments.pop("name", None)
    known = _REGISTRY.get(kind, {})
    if name not in known:
        raise UserError(f"no {kind} is called {name!r}; there are: {', '.join(sorted(known))}")
    cls = known[name]
    # JSON has lists only; the parts take tuples.
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    try:
        inspect.signature(cls).bind(**arguments)
    except TypeError as error:
        raise UserError(f"{kind} {name!r}: {error}") from error
    return cls(**arguments)
