"""Imported before `fastvae`: its training path on a machine that cannot decode or draw images."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from unittest.mock import MagicMock

# What `fastvae.training` imports and nothing that is measured here calls.
_UNUSED = {"PIL": ("PIL",), "torchvision": ("torchvision", "torchvision.utils")}


def _stand_in_for_missing() -> list[str]:
    """Empty modules in the place of packages that are not installed, whose names are returned."""
    missing = [package for package in _UNUSED if find_spec(package) is None]
    for package in missing:
        for name in _UNUSED[package]:
            module = MagicMock(name=name)
            module.__spec__ = ModuleSpec(name, None)
            sys.modules[name] = module
    return missing


MISSING = _stand_in_for_missing()
