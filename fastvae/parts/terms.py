"""What a model says of a batch, before an objective makes one number of it."""

from typing import NamedTuple

from torch import Tensor

from fastvae.parts.latents import LatentDensity, LatentPrior


class Terms(NamedTuple):
    """All in nats. S samples, B rows, D latents."""

    nll: Tensor
    """−log p(x | z) for each draw, `[S, B]`."""
    kl: Tensor
    """KL(q ‖ p), `[B]`."""
    z: Tensor | None = None
    """The draws, `[S, B, D]`; None where the latents are no rows' own (a network's weights)."""
    q: LatentDensity | None = None
    """q(z | x)."""
    p: LatentPrior | None = None
    """p(z)."""

    @property
    def elbo(self) -> Tensor:
        """The evidence lower bound, never weighted: `[B]` (Kingma & Welling 2014, eq. 3)."""
        return -(self.mean_nll + self.kl)

    @property
    def mean_nll(self) -> Tensor:
        """Over the draws, `[B]`."""
        # The mean of one costs a GPU two launches, and two more backward.
        return self.nll.mean(0) if len(self.nll) > 1 else self.nll.squeeze(0)

    def log_weights(self, *, path_only: bool = False) -> Tensor:
        """log p(x, z) − log q(z | x) for each draw, `[S, B]`.

        With `path_only`, gradients reach q through z alone, not through its own parameters
        (Roeder et al. 2017). Raises UserError where q has no density.
        """
        assert self.z is not None and self.q is not None and self.p is not None
        q = self.q.detached() if path_only else self.q
        return self.p.log_prob(self.z) - self.nll - q.log_prob(self.z)
