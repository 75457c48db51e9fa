"""What every launcher needs: rows, tiles, and the device to launch on."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

# One program of four warps takes this many elements at once: 8 a thread, two 128-bit loads of
# float32; and twice as many where that leaves enough programs, to share what each does once, unless
# a loop shares it already.
TILE = 1024
# No narrower than this only to idle fewer lanes: a row's part of a tile is 64 bytes or more.
NARROWEST = 64
# Rows are split among several programs where there would be too few programs to fill a GPU.
SPLIT_COLUMNS = 4 * TILE
FEW_PROGRAMS = 512
# As many programs of four warps run at once on the largest GPUs (132 multiprocessors, 16 each).
FULL = 2048
# No launch has more programs than this in its second dimension, along columns.
MOST_COLUMN_PROGRAMS = 65535
# One program looks after no more rows than it has threads.
MOST_ROWS = 128

# Set here because Triton 3.10 turns fusion of multiply and add off by default.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Tiling:
    """How `[B, D]` is cut: BLOCK_R × BLOCK_C tiles, each row shared by `splits` programs."""

    block_r: int
    block_c: int
    row_programs: int
    splits: int
    columns_per_split: int
    column_programs: int


def tiling(batch: int, columns: int, *, loops: bool = True) -> Tiling:
    """The tile shapes for `[batch, columns]`. In a kernel that `loops`, one program takes all
    columns of its rows unless rows are few; in others, one tile.

    Among the widths the one that idles the fewest lanes is taken, the widest of equals: 784 columns
    are 13 parts of 64, but 77 % of 1024. A narrow tile is one of many rows, and a loop over such
    tiles has few programs: each is left for where there are rows enough.
    """
    narrowest = _next_power_of_2(-(-columns // MOST_COLUMN_PROGRAMS))
    widest = max(min(TILE, max(4, _next_power_of_2(columns))), narrowest)
    widths = [widest]
    while widths[-1] > max(NARROWEST, narrowest):
        widths.append(widths[-1] // 2)
    programs = FEW_PROGRAMS if loops else 1
    widths = [c for c in widths if c == widest or batch * c >= programs * TILE]
    block_c = min(widths, key=lambda c: (-(-columns // c) * c, -c))
    is_shared = loops and columns > 3 * block_c
    is_large = batch * columns >= 2 * TILE * FULL
    tile = 2 * TILE if is_large and not is_shared else TILE
    block_r = min(max(1, tile // block_c), _next_power_of_2(batch))
    row_programs = -(-batch // block_r)
    column_programs = -(-columns // block_c)
    splits = 1
    if row_programs < FEW_PROGRAMS and columns > SPLIT_COLUMNS:
        splits = min(-(-columns // SPLIT_COLUMNS), -(-FEW_PROGRAMS // row_programs))
    columns_per_split = -(-column_programs // splits) * block_c
    splits = -(-columns // columns_per_split)
    return Tiling(block_r, block_c, row_programs, splits, columns_per_split, column_programs)


def rows(x: Tensor, leading: int = 1) -> Tensor:
    """`[B, …]` with any strides → `[B, D]`: a view where one exists, else a copy. With more
    leading dimensions to keep, `[S, B, …]` → `[S, B, D]`."""
    return x.flatten(leading) if x.dim() > leading else x.unsqueeze(leading)


def readable(target: Tensor) -> Tensor:
    """bool is read through the same bytes as uint8."""
    return target.view(torch.uint8) if target.dtype == torch.bool else target


def gathered(target: Tensor, indices: Tensor | None, leading: int) -> tuple[Tensor, Tensor | None]:
    """What a kernel reads through indices: the data set flattened after `leading` dimensions and
    the indices; or, where that would copy the whole data set, the chosen rows and None."""
    if indices is None:
        return target, None
    try:
        flat = (*target.shape[:leading], math.prod(target.shape[leading:]))
        return target.view(flat), indices.contiguous()
    except RuntimeError:  # strides that no view of so many dimensions has
        return target.index_select(0, indices), None


def few_programs(tiles: Tiling) -> tuple[int, int]:
    """How many programs look after all rows where most have nothing to do, and how many rows
    each: enough programs to fill a GPU if they do, and no more than that, to cost little."""
    batch = tiles.row_programs * tiles.block_r
    rows_each = min(MOST_ROWS, _next_power_of_2(-(-batch // FULL)))
    rows_each = max(rows_each, tiles.block_r)
    return -(-batch // rows_each), rows_each


def on_device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make it `x`'s."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
