"""What a model keeps besides its parameters, for steps that are to leave nothing behind."""

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
        watched = self.changing if self.steps >= STEPS_THAT_SHOW else list(self.module.buffers())
        self.watched, self.before = watched, [x.clone() for x in watched]

    @torch.no_grad()
    def restore(self, bad: Tensor) -> None:
        """After it: as they were, where `bad` (0-d) is not 0."""
        pairs = list(zip(self.watched, self.before, strict=True))
        if self.steps < STEPS_THAT_SHOW:
            self.steps += 1
            known = {id(x) for x in self.changing}
            self.changing += [x for x, y in pairs if id(x) not in known and not torch.equal(x, y)]
        for x, before in pairs:
            x.copy_(torch.where(bad.bool(), before, x))


def values_in_python(module: nn.Module) -> dict[str, object]:
    """Numbers and words that the parts of a module keep as attributes, by name."""
    return {
        f"{part_name}.{name}".lstrip("."): value
        for part_name, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, bool | int | float | complex | str)
    }
