"""q(z | x) beyond the diagonal Gaussian, by invertible transformations of its draws.

Shape suffixes: S samples, B rows, D latents.
"""

from typing import NamedTuple

import torch
from fastvae_kernels import Impl, normal, reparameterize_kl
from torch import Tensor, nn

from fastvae.errors import UserError
from fastvae.parts.latents import LatentGaussian, LatentPrior
from fastvae.parts.posteriors import Draw
from fastvae.parts.spec import part

# The draws by which moments are measured: always the same, so that an answer repeats.
MOMENT_SEED = 0x5A8279996ED9EBA1
MOMENT_DRAWS = 64


class FlowDensity(NamedTuple):
    """q(z | x) as an inverse autoregressive flow knows it: at the draws it made, `z` `[S, B, D]`.

    For any other z the flow would have to be inverted, which takes D passes, one after another.
    """

    z: Tensor
    log_prob_of_draws: Tensor

    def log_prob(self, z_SBD: Tensor) -> Tensor:
        """log q(z | x) of the draws themselves, `[S, B]` nats. Raises UserError for other z."""
        if z_SBD is not self.z:
            raise UserError(
                "an inverse autoregressive posterior knows its density at its own draws only: "
                "for other z use --posterior diagonal-gaussian"
            )
        return self.log_prob_of_draws

    def detached(self) -> "FlowDensity":
        """Raises UserError: draws and density are one computation here."""
        raise UserError(
            "an inverse autoregressive posterior measures its density as it draws, so the path "
            "through z cannot be told from its parameters: --gradient doubly-reparameterized and "
            "--decoder-draws all need --posterior diagonal-gaussian"
        )


@part("posterior", "inverse-autoregressive")
class InverseAutoregressive(nn.Module):
    """An inverse autoregressive flow (Kingma et al. 2016, arXiv:1606.04934), by zuko.

    z₀ ~ N(mu, σ²), then z_t = shift + scale · z_{t−1} for each layer, with shift and scale of
    latent d from a masked network that sees the context h and the latents before d; all latents
    in one pass. log q(z_T) = log N(z₀) − Σ_t Σ_d log scale. log scale stays within ±log 1000. The
    order of the latents is reversed from layer to layer; every layer starts as the identity.

    The statistics are mu, log σ² and h, each `[B, latent_dim]`. Computed in float32, also under
    autocast, so that the density is that of the draws (in float64 for float64 statistics).
    """

    statistics_per_latent = 3
    is_distribution = True
    is_gaussian = False

    def __init__(
        self, latent_dim: int, layers: int = 2, hidden: tuple[int, ...] = (128, 128)
    ) -> None:
        """`layers`: transformations; `hidden`: sizes of each masked network's hidden layers.

        Raises UserError where there are no layers, or no zuko.
        """
        super().__init__()
        if layers < 1:
            raise UserError(f"a flow has at least 1 layer, got {layers}")
        try:
            from zuko.flows import MaskedAutoregressiveTransform
        except ImportError as error:
            raise UserError(
                "an inverse autoregressive posterior needs the package zuko: "
                "pip install 'fastvae[flows]'"
            ) from error
        order = torch.arange(latent_dim)
        self.layers = nn.ModuleList(
            MaskedAutoregressiveTransform(
                latent_dim,
                context=latent_dim,
                order=order.flip(0) if layer % 2 else order,
                hidden_features=hidden,
                activation=nn.ELU,
            )
            for layer in range(layers)
        )
        for transform in self.layers:
            for parameter in transform.hyper[-1].parameters():  # type: ignore[index, union-attr]
                nn.init.zeros_(parameter)
        # In pairs of opposite sign and of variance 1: exact moments where the flow is affine.
        half = normal((MOMENT_DRAWS // 2, 1, latent_dim), MOMENT_SEED)
        half = half / half.square().mean(0).sqrt()
        self.moment_noise: Tensor
        self.register_buffer("moment_noise", torch.cat([half, -half]), persistent=False)

    def transform(self, z_SBD: Tensor, context_BD: Tensor) -> tuple[Tensor, Tensor]:
        """z₀ → z_T `[S, B, D]` and Σ log|det ∂z_t/∂z_{t−1}| `[S, B]`, all given each row's h."""
        log_det_SB = torch.zeros_like(z_SBD[..., 0])
        with torch.autocast(z_SBD.device.type, enabled=False):
            for layer in self.layers:
                z_SBD, of_layer_SB = layer(context_BD).call_and_ladj(z_SBD)
                log_det_SB = log_det_SB + of_layer_SB
        return z_SBD, log_det_SB

    def draw(
        self,
        statistics: Tensor,
        p: LatentPrior,
        num_samples: int,
        seed: int | Tensor,
        offset: int | Tensor,
        impl: Impl,
    ) -> Draw:
        """z₀ from the fused kernel, z_T by the flow; KL(q ‖ p) from the draws themselves."""
        mu, logvar, context = _widened(statistics).chunk(3, dim=1)
        start, _ = reparameterize_kl(
            mu, logvar, seed, offset=offset, num_samples=num_samples, impl=impl
        )
        z, log_det = self.transform(start, context)
        log_q = LatentGaussian(mu, logvar).log_prob(start) - log_det
        return Draw(z, (log_q - p.log_prob(z)).mean(0), FlowDensity(z, log_q))

    def moments(self, statistics: Tensor) -> LatentGaussian:
        """The mean and log-variance of each latent, `[B, D]` each, from 64 draws.

        The draws are the same for every row and every call, so a row's answer depends on its
        statistics alone; the error of a mean is about an eighth of what the flow adds to σ.
        """
        mu, logvar, context = _widened(statistics).chunk(3, dim=1)
        z, _ = self.transform(mu + (0.5 * logvar).exp() * self.moment_noise, context)
        variance = z.var(0, unbiased=False)
        return LatentGaussian(z.mean(0), variance.clamp(min=torch.finfo(z.dtype).tiny).log())


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
