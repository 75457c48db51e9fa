"""What is maximised, from a model's terms."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Terms(NamedTuple):
    """What a model says of each image, in nats: `nll` = −log p(x | z) and `kl` = KL(q ‖ p)."""

    nll: Tensor
    kl: Tensor

    @property
    def elbo(self) -> Tensor:
        """The evidence lower bound, never weighted: `[B]` nats (Kingma & Welling 2014, eq. 3)."""
        return -(self.nll + self.kl)


class BetaELBO(nn.Module):
    """nll + β·kl (Higgins et al. 2017), with β rising linearly from 0 over the first samples.

    β = 1 without warm-up is the ELBO.
    """

    def __init__(self, beta: float = 1.0, warmup_samples: int = 0) -> None:
        super().__init__()
        self.beta = beta
        self.warmup_samples = warmup_samples

    def kl_weight(self, position: Tensor) -> Tensor:
        """β at the given numbers of samples met before: int64 `[…]` → float32 `[…]`."""
        if self.warmup_samples == 0:
            return torch.full_like(position, self.beta, dtype=torch.float32)
        return self.beta * (position.float() / self.warmup_samples).clamp(max=1.0)

    def forward(self, terms: Terms, position: Tensor) -> Tensor:
        """The loss of each image, `[B]` nats; `position` int64 `[B]` counts samples met before."""
        return terms.nll + self.kl_weight(position) * terms.kl
