"""How kernels find the rows of a target. R: rows of a tile."""

import triton
import triton.language as tl


@triton.jit
def target_rows(indices_B, row_R, B, N):
    """The rows of the target that belong to `row_R` (int64): those of the same numbers, or, unless
    indices are None, `indices_B[row]` of a data set of N. And whether there is such a row: an
    index outside of the data set becomes 0, and what comes of it must become NaN."""
    is_row = row_R < B
    if indices_B is None:
        return row_R, is_row
    else:
        at_R = tl.load(indices_B + row_R, mask=is_row, other=0)
        exists = is_row & (at_R >= 0) & (at_R < N)
        return tl.where(exists, at_R, 0), exists
