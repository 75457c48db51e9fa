"""p(x | z): how likely an image is, given the decoder's output.

Every likelihood is a normalised density or mass over the values it names; `observe` maps stored
pixels to those values. A `Bernoulli` that does not binarise is the one exception, and says so
through `is_density`.
"""

import math
from typing import Literal, Protocol

import torch
from fastvae_kernels import (
    Impl,
    bernoulli_nll,
    binarize,
    gaussian_nll,
    logistic_mixture_channels,
    logistic_mixture_mean,
    logistic_mixture_nll,
    logistic_mixture_sample,
    normal,
    uniform,
)
from torch import Tensor, nn
from torch.nn.functional import softplus

from fastvae.batch import gathered
from fastvae.errors import UserError
from fastvae.parts.networks import pixels, require_pixels
from fastvae.parts.ranks import mean_over_ranks
from fastvae.parts.spec import part

Binarize = Literal["dynamic", "static", "none"]


class Likelihood(Protocol):
    """What a likelihood answers. `parameters` is the decoder's output `[B, P, H, W]`."""

    is_density: bool
    """False where `nll` is no −log p(x | z) of the observed values, but a cross-entropy."""
    bits_offset: float
    """Added to −log₂ p per dimension so that it counts bits of the stored 8-bit value."""
    couples_rows: bool
    """Whether the nll of one image depends on the other images of the batch."""

    def parameter_channels(self, image_channels: int) -> int:
        """P: how many channels the decoder gives."""

    def observe(
        self,
        x: Tensor,
        seed: int | Tensor,
        offset: int | Tensor,
        indices: Tensor | None = None,
    ) -> Tensor:
        """Stored images (uint8, or floating in [0, 1]) as the values modelled, float32.

        With `indices` int64 `[B]`, x is a data set `[N, C, H, W]` and row b number indices[b]."""

    def nll(self, parameters: Tensor, x: Tensor, impl: Impl) -> Tensor:
        """−log p(x | z), `[B]` in nats."""

    def mean(self, parameters: Tensor) -> Tensor:
        """E[x | z], float32 `[B, C, H, W]`."""

    def sample(self, parameters: Tensor, seed: int | Tensor) -> Tensor:
        """Draw x ~ p(x | z), float32 `[B, C, H, W]`."""


def _observe_pixels(
    self: nn.Module,
    x: Tensor,
    seed: int | Tensor,
    offset: int | Tensor,
    indices: Tensor | None = None,
) -> Tensor:
    """The pixels in [0, 1]: `observe` of likelihoods that draw nothing."""
    return pixels(gathered(x, indices))


@part("likelihood", "bernoulli")
class Bernoulli(nn.Module):
    """Independent pixels in {0, 1}; the decoder gives logits.

    Grey pixels are read as probabilities. "dynamic" draws fresh zeros and ones each time an image
    is met (as in Burda et al. 2016), so that the ELBO is a bound on log p(x) of binary images;
    "static" expects images that were binarised once, when they were loaded; "none" compares with
    the grey values themselves, which is a cross-entropy and bounds no likelihood.
    """

    bits_offset = 0.0
    couples_rows = False

    def __init__(self, binarize: Binarize = "dynamic") -> None:
        super().__init__()
        if binarize not in ("dynamic", "static", "none"):
            raise UserError(f"binarize is dynamic, static or none, got {binarize!r}")
        self.binarize = binarize
        self.is_density = binarize != "none"

    def parameter_channels(self, image_channels: int) -> int:
        """A logit for each value."""
        return image_channels

    def of_average(self, images: Tensor) -> Tensor:
        """Where a decoder may begin, for images `[N, C, H, W]` as stored: the logit `[C, H, W]` of
        each pixel's mean (Burda et al. 2016, in their code)."""
        return torch.logit(pixels(images).mean(0), eps=1e-3)

    def observe(
        self,
        x: Tensor,
        seed: int | Tensor,
        offset: int | Tensor,
        indices: Tensor | None = None,
    ) -> Tensor:
        """Zeros and ones if binarised dynamically, else the pixels in [0, 1]."""
        if self.binarize == "dynamic":
            require_pixels(x)
            return binarize(x, seed, offset=offset, indices=indices)
        return pixels(gathered(x, indices))

    def nll(self, parameters: Tensor, x: Tensor, impl: Impl = "auto") -> Tensor:
        """Σ softplus(logit) − logit·x, `[B]` nats."""
        return bernoulli_nll(parameters, x, row_weight=_mean_weight(parameters), impl=impl)

    def mean(self, parameters: Tensor) -> Tensor:
        """The probability of a white pixel."""
        return torch.sigmoid(parameters.float())

    def sample(self, parameters: Tensor, seed: int | Tensor) -> Tensor:
        """Zeros and ones."""
        probability = self.mean(parameters)
        return (
            uniform(tuple(probability.shape), seed, device=probability.device) < probability
        ).float()


@part("likelihood", "gaussian")
class Gaussian(nn.Module):
    """Independent pixels N(mean, σ²) on [0, 1]-scaled values, with one σ² for all.

    The density is continuous and no noise is added to the 8-bit pixels, so its bits per dimension
    (which count 256 levels) are not comparable with those of a discrete likelihood.
    """

    is_density = True
    bits_offset = 8.0
    couples_rows = False

    def __init__(self, variance: float | Literal["learned"] = "learned") -> None:
        """`variance`: σ² on the [0, 1] scale, or "learned" with the weights (from 0.1)."""
        super().__init__()
        self.logvar: Tensor
        if variance == "learned":
            self.logvar = nn.Parameter(torch.tensor(math.log(0.1)))
        elif math.isfinite(variance) and variance > 0:
            self.register_buffer("logvar", torch.tensor(math.log(variance)))
        else:
            raise UserError(f"variance is positive or 'learned', got {variance}")

    def parameter_channels(self, image_channels: int) -> int:
        """A mean for each value."""
        return image_channels

    observe = _observe_pixels

    def nll(self, parameters: Tensor, x: Tensor, impl: Impl = "auto") -> Tensor:
        """The full density with its constant, `[B]` nats."""
        return gaussian_nll(
            parameters, x, self.logvar, row_weight=_mean_weight(parameters), impl=impl
        )

    def mean(self, parameters: Tensor) -> Tensor:
        """The decoder's output itself; not clipped to [0, 1]."""
        return parameters.float()

    def sample(self, parameters: Tensor, seed: int | Tensor) -> Tensor:
        """mean + σ ε."""
        return _gaussian_sample(self.mean(parameters), self.logvar, seed)


@part("likelihood", "gaussian-per-pixel")
class GaussianPerPixel(nn.Module):
    """Independent pixels N(mean, σ²); the decoder gives mean and log σ² for each.

    A pixel that never changes would let σ fall to 0 and its density grow without end, so σ stays
    above `min_std`: log σ² = softplus(s − m) + m, with m = 2 log min_std and s the decoder's
    second output. The decoder's channels are all means, then all s.
    """

    is_density = True
    bits_offset = 8.0
    couples_rows = False

    def __init__(self, min_std: float = 0.05) -> None:
        """`min_std`: what σ stays above, on the [0, 1] scale of the pixels."""
        super().__init__()
        if not (math.isfinite(min_std) and min_std > 0):
            raise UserError(f"min_std is positive, got {min_std}")
        self.min_logvar = 2.0 * math.log(min_std)

    def parameter_channels(self, image_channels: int) -> int:
        """A mean and a log-variance for each value."""
        return 2 * image_channels

    observe = _observe_pixels

    def nll(self, parameters: Tensor, x: Tensor, impl: Impl = "auto") -> Tensor:
        """The full density with its constant, `[B]` nats."""
        mean, logvar = self._mean_and_logvar(parameters)
        return gaussian_nll(mean, x, logvar, row_weight=_mean_weight(mean), impl=impl)

    def mean(self, parameters: Tensor) -> Tensor:
        """The decoder's means; not clipped to [0, 1]."""
        return parameters.chunk(2, dim=1)[0].float()

    def sample(self, parameters: Tensor, seed: int | Tensor) -> Tensor:
        """mean + σ ε, each pixel with its own σ."""
        return _gaussian_sample(*self._mean_and_logvar(parameters), seed)

    def _mean_and_logvar(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        mean, second = parameters.chunk(2, dim=1)
        return mean, softplus(second - self.min_logvar) + self.min_logvar


@part("likelihood", "gaussian-optimal")
class GaussianOptimal(nn.Module):
    """Independent pixels N(mean, σ²), with σ² the mean squared error of the batch: the optimal
    σ-VAE (Rybkin et al. 2021, arXiv:2006.13202, section 3.2).

    In training σ² is that of the global batch, over all processes; its gradient is 0 at the
    optimum. A held-out density must not look at what it measures, so outside of training σ² is a
    running mean of the training batches' (its weight 1 % a step, after a start of plain averages).
    """

    is_density = True
    bits_offset = 8.0
    couples_rows = True

    def __init__(self) -> None:
        super().__init__()
        self.logvar: Tensor
        self.steps: Tensor
        self.register_buffer("logvar", torch.tensor(math.log(0.1)))
        self.register_buffer("steps", torch.tensor(0.0))

    def parameter_channels(self, image_channels: int) -> int:
        """A mean for each value."""
        return image_channels

    observe = _observe_pixels

    def nll(self, parameters: Tensor, x: Tensor, impl: Impl = "auto") -> Tensor:
        """The full density with its constant, `[B]` nats."""
        if not self.training:
            return gaussian_nll(
                parameters, x, self.logvar, row_weight=_mean_weight(parameters), impl=impl
            )
        means = parameters.detach().to(torch.promote_types(parameters.dtype, torch.float32))
        error = mean_over_ranks((means - pixels(x)).square().mean())
        # Images that are met exactly would make σ² 0: half a pixel's step is as fine as they are.
        logvar = error.clamp(min=(0.5 / 255) ** 2).log()
        with torch.no_grad():
            good = logvar.isfinite()  # a step that is not is skipped, and must leave nothing here
            self.steps += good
            found = torch.where(good, logvar, self.logvar)
            self.logvar.lerp_(found, torch.clamp(1.0 / self.steps.clamp(min=1), min=0.01))
        return gaussian_nll(parameters, x, logvar, row_weight=_mean_weight(parameters), impl=impl)

    def mean(self, parameters: Tensor) -> Tensor:
        """The decoder's output itself; not clipped to [0, 1]."""
        return parameters.float()

    def sample(self, parameters: Tensor, seed: int | Tensor) -> Tensor:
        """mean + σ ε."""
        return _gaussian_sample(self.mean(parameters), self.logvar, seed)


@part("likelihood", "categorical")
class Categorical(nn.Module):
    """Independent values among `levels` integers, with a logit for each.

    8-bit pixels are cut into `levels` equal steps, so 256 models them as they are. The decoder's
    channels are all values' logits for level 0, then for level 1, …
    """

    is_density = True
    bits_offset = 0.0
    couples_rows = False

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        if not 2 <= levels <= 256:
            raise UserError(f"levels lies in 2..256, got {levels}")
        self.levels = levels

    def parameter_channels(self, image_channels: int) -> int:
        """A logit for each value and level."""
        return self.levels * image_channels

    def of_average(self, images: Tensor) -> Tensor:
        """Where a decoder may begin, for images `[N, C, H, W]` as stored: the logarithm of how
        often each pixel has each level, with one more count for all, `[levels · C, H, W]`."""
        level = level_of(images, self.levels)
        counts = [(level == k).sum(0) + 1.0 for k in range(self.levels)]
        return torch.cat(counts).log() - math.log(len(images) + self.levels)

    def observe(
        self,
        x: Tensor,
        seed: int | Tensor,
        offset: int | Tensor,
        indices: Tensor | None = None,
    ) -> Tensor:
        """The level of each pixel, scaled to [0, 1]."""
        return quantize(gathered(x, indices), self.levels)

    def nll(self, parameters: Tensor, x: Tensor, impl: Impl = "auto") -> Tensor:
        """−Σ log softmax(logits)[level], `[B]` nats; `x` in [0, 1] is read as its nearest level."""
        logits = parameters.float().unflatten(1, (self.levels, -1))
        level = (x.float() * (self.levels - 1)).round().long().unsqueeze(1)
        chosen = logits.gather(1, level).squeeze(1)
        return (torch.logsumexp(logits, dim=1) - chosen).flatten(1).sum(1)

    def mean(self, parameters: Tensor) -> Tensor:
        """The expected level, scaled to [0, 1]."""
        probability = parameters.float().unflatten(1, (self.levels, -1)).softmax(1)
        values = torch.linspace(0, 1, self.levels, device=parameters.device)
        return torch.einsum("blchw,l->bchw", probability, values)

    def sample(self, parameters: Tensor, seed: int | Tensor) -> Tensor:
        """A level for each value, scaled to [0, 1]."""
        probability = parameters.float().unflatten(1, (self.levels, -1)).softmax(1)
        shape = (len(parameters), *probability.shape[2:])
        draws = uniform(shape, seed, device=parameters.device).unsqueeze(1)
        # The last step of the sum may round to less than 1; no draw reaches beyond it.
        level = (probability.cumsum(1)[:, :-1] <= draws).sum(1)
        return level.float() / (self.levels - 1)


@part("likelihood", "logistic-mixture")
class LogisticMixture(nn.Module):
    """8-bit pixels as a mixture of discretised logistics, in which the colours of a pixel depend on
    each other: PixelCNN++ (Salimans et al. 2017, arXiv:1701.05517), sections 2.1 and 2.2.

    The decoder's channels are ordered as `fastvae_kernels.logistic_mixture_channels` has them.
    """

    is_density = True
    bits_offset = 0.0
    couples_rows = False
    LEVELS = 256

    def __init__(self, mixtures: int = 5) -> None:
        """`mixtures`: components for each pixel."""
        super().__init__()
        if mixtures < 1:
            raise UserError(f"a mixture has at least 1 component, got {mixtures}")
        self.mixtures = mixtures

    def parameter_channels(self, image_channels: int) -> int:
        """M·(1 + 2C + C(C−1)/2) for C = 1, 2 or 3: weights, means, log-scales and couplings."""
        if not 1 <= image_channels <= 3:
            raise UserError(
                f"a logistic mixture takes images of 1 to 3 channels, got {image_channels}"
            )
        return logistic_mixture_channels(self.mixtures, image_channels)

    def of_average(self, images: Tensor) -> Tensor:
        """Where a decoder may begin, for images `[N, C, H, W]` as stored: the components' means at
        M quantiles of each colour, their scales an M-th of its spread, `[P, H, W]`."""
        _, channels, height, width = images.shape
        last = self.LEVELS - 1
        ranks = (torch.arange(self.mixtures) + 0.5) / self.mixtures
        start = torch.zeros(self.parameter_channels(channels) // self.mixtures, self.mixtures)
        for c in range(channels):
            levels = level_of(images[:, c], self.LEVELS).flatten()
            share = levels.long().bincount(minlength=self.LEVELS).cumsum(0) / len(levels)
            means = 2.0 * torch.searchsorted(share, ranks) / last - 1.0  # as the kernel, on [−1, 1]
            spread = (2.0 * levels / last).std(correction=0).clamp(min=1.0 / last)
            start[1 + 2 * c] = means
            start[2 + 2 * c] = (spread / self.mixtures).log()
        return start.view(-1, 1, 1).expand(-1, height, width)

    observe = _observe_pixels

    def nll(self, parameters: Tensor, x: Tensor, impl: Impl = "auto") -> Tensor:
        """−Σ log Σ_m π_m p_m(level), `[B]` nats; `x` in [0, 1] is read as its nearest level."""
        return logistic_mixture_nll(
            parameters, x, mixtures=self.mixtures, levels=self.LEVELS, impl=impl
        )

    def mean(self, parameters: Tensor) -> Tensor:
        """The components' means, each clipped to [0, 1], weighted: close to E[x | z]."""
        return logistic_mixture_mean(parameters, self.mixtures, self._image_channels(parameters))

    def sample(self, parameters: Tensor, seed: int | Tensor) -> Tensor:
        """A level for each value, scaled to [0, 1]."""
        channels = self._image_channels(parameters)
        return logistic_mixture_sample(parameters, self.mixtures, channels, self.LEVELS, seed)

    def _image_channels(self, parameters: Tensor) -> int:
        return {self.parameter_channels(c): c for c in (1, 2, 3)}[parameters.shape[1]]


def _gaussian_sample(mean: Tensor, logvar: Tensor, seed: int | Tensor) -> Tensor:
    noise = normal(tuple(mean.shape), seed, device=mean.device)
    return mean.float() + (0.5 * logvar.float()).exp() * noise


def level_of(x: Tensor, levels: int) -> Tensor:
    """Which of `levels` equal steps each pixel falls into: uint8 or floating `[B, …]` → float32
    0 … levels − 1. Of 8-bit pixels, 256 levels change nothing."""
    steps = x.float() * (levels / 256) if x.dtype == torch.uint8 else pixels(x) * levels
    return steps.floor().clamp(max=levels - 1)


def quantize(x: Tensor, levels: int) -> Tensor:
    """The level of each pixel, scaled to [0, 1]: see `level_of`."""
    return level_of(x, levels) / (levels - 1)


def _mean_weight(parameters: Tensor) -> float:
    """The gradient that each row's nll meets where their mean is the loss. Other objectives get the
    right gradient too, later."""
    return 1.0 / max(1, len(parameters))
