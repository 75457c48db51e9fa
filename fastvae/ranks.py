"""Sharing rows among the processes of an evaluation, so that each counts exactly once."""

from accelerate import Accelerator
from torch import Tensor

from fastvae.errors import UserError


class Share:
    """This process's part of N rows: those from `first` up to `last`."""

    def __init__(self, rows: int, accelerator: Accelerator | None = None) -> None:
        self.accelerator = accelerator
        self.rows = rows
        rank = accelerator.process_index if accelerator else 0
        world = accelerator.num_processes if accelerator else 1
        if rows < world:
            raise UserError(f"{rows} images are too few for {world} processes: use {rows} at most")
        self.first, self.last = rows * rank // world, rows * (rank + 1) // world

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all."""
        return self.accelerator is None or self.accelerator.is_main_process

    def batches(self, size: int) -> list[slice]:
        """The part, cut into slices of at most `size` rows."""
        return [slice(s, min(s + size, self.last)) for s in range(self.first, self.last, size)]

    def summed(self, values: Tensor) -> Tensor:
        """The sum over processes."""
        if self.accelerator is None:
            return values
        return self.accelerator.reduce(values, reduction="sum")

    def joined(self, values: Tensor) -> Tensor:
        """Every process's rows `[last − first, …]` as one `[rows, …]`, on all of them."""
        whole = values.new_zeros(self.rows, *values.shape[1:])
        whole[self.first : self.last] = values
        return self.summed(whole)
