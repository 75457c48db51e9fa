"""log p(x) as the logarithm of an average of weights, one chunk of samples at a time."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.errors import UserError

# (first sample, count) -> [count, B]. The noise of a sample should be a function of its place,
# so that the chunk changes nothing.
LogWeights = Callable[[int, int], Tensor]


class Estimate(NamedTuple):
    """log p(x) of each image, float64 `[B]`, and how far it may be trusted.

    Attributes:
        log_marginal: nats. The average below the logarithm is unbiased, the logarithm is not: it
            bounds log p(x) from below on average (Burda et al. 2016).
        standard_error: of `log_marginal`, nats, by the delta method: std(w) / (mean(w) √S). It
            knows only the weights that were drawn: where `effective_sample_size` is near 1 it
            says too little. nan for one sample, or where every weight is zero.
        effective_sample_size: (Σ w)² / Σ w², from 1 to S (Kong 1992).
    """

    log_marginal: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor


class Mean(NamedTuple):
    mean: float
    standard_error: float


@torch.no_grad()
def importance_log_marginal(log_weights: LogWeights, samples: int, chunk: int) -> Estimate:
    """log p(x) ≈ log (1/S) Σ_s w_s with w_s = p(x, z_s) / q(z_s | x), z_s ~ q(z | x).

    Burda et al. 2016 (arXiv:1509.00519), equation 8: the bound of the importance-weighted
    autoencoder, taken as an estimate. Only three numbers are kept for each image.

    Args:
        log_weights: called as `log_weights(start, count)` for samples start … start + count − 1
            of all B images; answers log w, nats, floating `[count, B]`.
        samples: S, for each image.
        chunk: samples to ask for at once (see `chunk_size`).

    Raises:
        UserError: for fewer than one sample, or log weights of another shape than `[count, B]`.
    """
    if samples < 1 or chunk < 1:
        raise UserError(f"samples and chunk must be at least 1, got {samples} and {chunk}")
    for start in range(0, samples, chunk):
        count = min(chunk, samples - start)
        log_w = log_weights(start, count)
        if log_w.dim() != 2 or len(log_w) != count:
            raise UserError(
                f"log weights of {count} samples must be [{count}, B], got {tuple(log_w.shape)}"
            )
        log_w = log_w.double()
        if start == 0:
            log_sum = log_sum_of_squares = log_w.new_full(log_w.shape[1:], -math.inf)
        log_sum = torch.logaddexp(log_sum, log_w.logsumexp(0))
        log_sum_of_squares = torch.logaddexp(log_sum_of_squares, (2 * log_w).logsumexp(0))
    effective = (2 * log_sum - log_sum_of_squares).exp()
    # With var(w) = (Σ w² − S mean²) / (S − 1), the variance of mean(w) / mean(w) is what follows.
    relative_variance = (
        (samples / effective - 1).clamp(min=0) / (samples - 1)
        if samples > 1
        else torch.full_like(effective, math.nan)
    )
    return Estimate(log_sum - math.log(samples), relative_variance.sqrt(), effective)


def prior_average_log_marginal(
    log_likelihood: Callable[[Tensor], Tensor],
    sample_prior: Callable[[int, int], Tensor],
    samples: int,
    chunk: int,
) -> Estimate:
    """log p(x) ≈ log (1/S) Σ_s p(x | z_s) with z_s ~ p(z): needs no encoder, and so none to blame.

    Its variance grows exponentially in KL(p(z | x) ‖ p(z)): for a few latents only, and to be
    believed where the effective sample size is large.

    Args:
        log_likelihood: maps z to log p(x | z), nats, `[count, B]`.
        sample_prior: called as `sample_prior(start, count)`; answers z in whatever shape
            `log_likelihood` takes: `[count, B, D]`, or `[count, D]` to meet all images with the
            same draws. The latter is far cheaper, since the decoder runs once for all of them,
            but the images' errors are then correlated.
        samples, chunk: as for `importance_log_marginal`.
    """
    return importance_log_marginal(
        lambda start, count: log_likelihood(sample_prior(start, count)), samples, chunk
    )


def chunk_size(
    memory_bytes: int, images: int, numbers_per_sample: int, bytes_per_number: int = 4
) -> int:
    """How many samples of each of `images` images fit in `memory_bytes` at once, at least 1.

    Args:
        numbers_per_sample: what one sample of one image holds at its peak: its latents, its
            activations and its decoded pixels.

    Raises:
        UserError: if not even one sample of each image fits.
    """
    for_one = images * numbers_per_sample * bytes_per_number
    if for_one > memory_bytes:
        raise UserError(
            f"one sample of each of {images} images takes {for_one} bytes, more than the "
            f"{memory_bytes} allowed: use smaller batches or allow more memory"
        )
    return memory_bytes // max(for_one, 1)


def mean_and_standard_error(values: Tensor) -> Mean:
    """The mean over images of `values` `[N]`, and its standard error std / √N, in float64.

    The standard error is nan for one value.

    Raises:
        UserError: for no values, or more than one dimension.
    """
    if values.dim() != 1 or len(values) == 0:
        raise UserError(f"a mean over images needs values [N], N ≥ 1; got {tuple(values.shape)}")
    values = values.double()
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(values.mean().item(), error)
