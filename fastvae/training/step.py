"""What one step computes: the module that is compiled and wrapped for distribution."""

import torch
from torch import Tensor, nn

from fastvae.parts import BetaELBO
from fastvae.vae import VAE

METRICS = ("loss", "nll", "kl")


class TrainingStep(nn.Module):
    """Images in, a scalar to differentiate and the sums to log out."""

    def __init__(self, vae: VAE, objective: BetaELBO, seed: int) -> None:
        super().__init__()
        self.vae = vae
        self.objective = objective
        self.register_buffer("seed", torch.tensor(seed), persistent=False)

    def forward(self, images: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """One part of a batch.

        Args:
            images: `[B, C, H, W]` as stored.
            position: 0-d int64, the number of samples that the run met before the first of them.

        Returns:
            The mean loss (0-d, nats per image) and the sums over images of `METRICS` (float64).
        """
        terms = self.vae(images, self.seed, position)
        positions = position + torch.arange(len(images), device=images.device)
        loss = self.objective(terms, positions)
        sums = torch.stack([loss.detach().sum(), terms.nll.detach().sum(), terms.kl.detach().sum()])
        return loss.mean(), sums.double()
