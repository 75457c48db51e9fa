"""What several kernels read in the same way. R: rows of a tile."""

import triton
import triton.language as tl

from fastvae_kernels.triton_kernels.device_math import is_new


@triton.jit
def within(start, D, BLOCK_C: tl.constexpr):
    """Which of the BLOCK_C columns from `start` on there are, compared in as few bits as D has."""
    return tl.arange(0, BLOCK_C) < D - start


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


@triton.jit
def any_is_new(grad_nll_B, grad_nll_stride_b, row_weight, begin, B, ROWS: tl.constexpr):
    """Whether any of the rows begin … begin+ROWS−1 meets another gradient than row_weight."""
    row_R = begin + tl.arange(0, ROWS).to(tl.int64)
    grad_nll_R = tl.load(grad_nll_B + row_R * grad_nll_stride_b, mask=row_R < B, other=0.0)
    changed_R = is_new(grad_nll_R, row_weight) & (row_R < B)
    return tl.max(changed_R.to(tl.int32), axis=0) > 0
