"""What a step changes in a model besides its parameters: buffers, and values kept in Python."""

import torch
from torch import Tensor, nn

# What a step changes it has changed by then.
STEPS_THAT_SHOW = 3


class Buffers:
    """The buffers of a module that a step changes (running means), as they were before it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.changing: list[Tensor] = []
        self.before: list[Tensor] = []
        self.steps = 0

    def keep(self) -> None:
        """Before a step: of all buffers in the first steps, then of those that had changed."""
        shown = self.steps >= STEPS_THAT_SHOW
        self.watched = self.changing if shown else list(self.module.buffers())
        self.before = [x.clone() for x in self.watched]
        self.versions = [x._version for x in self.watched]

    @torch.no_grad()
    def restore(self, bad: Tensor) -> None:
        """After it: as they were, where `bad` (0-d) is not 0."""
        if self.steps < STEPS_THAT_SHOW:
            self.steps += 1
            known = {id(x) for x in self.changing}
            for x, before, version in zip(self.watched, self.before, self.versions, strict=True):
                # PyTorch's own running means are written without a new version.
                if id(x) not in known and (x._version != version or not torch.equal(x, before)):
                    self.changing.append(x)
        for x, before in zip(self.watched, self.before, strict=True):
            x.copy_(torch.where(bad.bool(), before, x))


def values_in_python(module: nn.Module) -> dict[str, object]:
    """Numbers and words that the parts of a module keep as attributes, by name."""
    return {
        f"{part_name}.{name}".lstrip("."): value
        for part_name, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, bool | int | float | complex | str)
    }
