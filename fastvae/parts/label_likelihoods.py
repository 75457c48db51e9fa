"""p(y | x, w): how likely a label is, given a network's outputs for x with weights w.

Shape suffixes: S draws of the weights, B rows, K classes.
"""

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastvae.errors import UserError
from fastvae.parts.latents import LOG_2PI
from fastvae.parts.spec import part


class LabelLikelihood(Protocol):
    """What a likelihood of labels answers. `outputs` is what the network gives."""

    num_outputs: int
    """How many values the network gives for each row."""
    is_density: bool
    """As an image's likelihood has it: `nll` is −log p."""
    bits_offset: None
    """There are no bits for each pixel."""
    couples_rows: bool
    """As an objective has it."""

    def check(self, labels: Tensor | None) -> None:
        """Raise UserError unless these are labels that `nll` can take. Makes the host wait."""

    def nll(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """−log p(y | x, w) in nats: `[S, B, num_outputs]`, `[B]` → float32 `[S, B]`."""

    def pool(self, outputs: Tensor) -> Tensor:
        """What `predict` needs to know of S draws: `[S, B, num_outputs]` → `[B, …]`."""

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """What it needs to know of the draws of two pools."""

    def predict(self, pool: Tensor, draws: int) -> Any:
        """The mean of p(y | x, w) over so many draws of w."""


@part("label-likelihood", "categorical")
class CategoricalLabels(nn.Module):
    """Classes 0 … K − 1; the network gives a logit for each."""

    is_density = True
    bits_offset = None
    couples_rows = False

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise UserError(f"labels to predict are of 2 classes or more, got {num_classes}")
        self.num_outputs = num_classes

    def check(self, labels: Tensor | None) -> None:
        """Classes of an integer type, all of them known."""
        if labels is None or labels.is_floating_point():
            raise UserError(
                f"labels are the classes 0..{self.num_outputs - 1}, got {_kind(labels)}"
            )
        if labels.min() < 0 or labels.max() >= self.num_outputs:
            raise UserError(
                f"this network knows the classes 0..{self.num_outputs - 1}, "
                f"got {int(labels.min())}..{int(labels.max())}"
            )

    def nll(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the softmax: `[S, B, K]`, int64 `[B]` → `[S, B]` nats."""
        logits = outputs.float()
        chosen = labels.expand(logits.shape[:2]).unsqueeze(2)
        return torch.logsumexp(logits, dim=2) - logits.gather(2, chosen).squeeze(2)

    def pool(self, outputs: Tensor) -> Tensor:
        """log Σ_s p(k | x, w_s), `[B, K]`."""
        return torch.logsumexp(outputs.float().log_softmax(2), dim=0)

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum of both sums, in logarithms."""
        return torch.logaddexp(a, b)

    def predict(self, pool: Tensor, draws: int) -> Tensor:
        """The probability of each class, float32 `[B, K]`."""
        return (pool - math.log(draws)).exp()


class TargetPrediction(NamedTuple):
    """Mean and standard deviation of a predictive distribution, each float32 `[B]`."""

    mean: Tensor
    std: Tensor


@part("label-likelihood", "gaussian")
class GaussianTargets(nn.Module):
    """Real targets y ~ N(mean, σ²) with one learned σ; the network gives the mean.

    Both are in units in which the training targets have mean 0 and standard deviation 1, so that
    the same prior of weights fits targets of any scale; densities and predictions are in the
    targets' own unit.
    """

    is_density = True
    bits_offset = None
    couples_rows = False
    num_outputs = 1

    def __init__(self, target_mean: float, target_std: float) -> None:
        """Mean and standard deviation of the training targets, in their unit."""
        super().__init__()
        if not (math.isfinite(target_mean) and math.isfinite(target_std) and target_std > 0):
            raise UserError(
                "targets to predict must differ from each other: their standard deviation is "
                f"{target_std}"
            )
        self.target_mean: Tensor
        self.target_std: Tensor
        self.register_buffer("target_mean", torch.tensor(target_mean))
        self.register_buffer("target_std", torch.tensor(target_std))
        # log σ² in standardised units, from 1: what is left to explain before training.
        self.logvar = nn.Parameter(torch.tensor(0.0))

    def check(self, labels: Tensor | None) -> None:
        """Targets of a floating type."""
        if labels is None or not labels.is_floating_point():
            raise UserError(f"labels are real targets (floating point), got {_kind(labels)}")

    def nll(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The density in the targets' unit: `[S, B, 1]`, float `[B]` → `[S, B]` nats."""
        standardised = (labels.float() - self.target_mean) / self.target_std
        error = standardised - outputs.squeeze(2).float()
        squares = error.square() * torch.exp(-self.logvar)
        return 0.5 * (squares + self.logvar + LOG_2PI) + self.target_std.log()

    def pool(self, outputs: Tensor) -> Tensor:
        """Σ_s mean_s and Σ_s mean_s², standardised, float64 `[B, 2]`."""
        means = outputs.squeeze(2).double()
        return torch.stack([means.sum(0), means.square().sum(0)], dim=1)

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum of both sums."""
        return a + b

    def predict(self, pool: Tensor, draws: int) -> TargetPrediction:
        """Of the mixture over draws: its variance is the noise's and that of the means."""
        mean, square = (pool / draws).unbind(1)
        variance = (square - mean.square()).clamp(min=0.0) + self.logvar.double().exp()
        return TargetPrediction(
            (mean * self.target_std + self.target_mean).float(),
            (variance.sqrt() * self.target_std).float(),
        )

    def in_unit(self, outputs: Tensor) -> Tensor:
        """The means of y in the targets' unit: `[…, 1]` → `[…]`."""
        return outputs.squeeze(-1).float() * self.target_std + self.target_mean

    @property
    def target_logvar(self) -> Tensor:
        """log σ² in the square of the targets' unit, 0-d."""
        return self.logvar + 2.0 * self.target_std.log()


def _kind(labels: Tensor | None) -> str:
    if labels is None:
        return "none"
    return "real targets" if labels.is_floating_point() else "classes"
