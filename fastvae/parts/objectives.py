"""What is minimised, from a model's terms: one loss for each row, in nats."""

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from fastvae import noise
from fastvae.errors import UserError
from fastvae.parts.latents import LatentGaussian
from fastvae.parts.ranks import joined_over_ranks
from fastvae.parts.spec import part
from fastvae.parts.terms import Terms


class Objective(Protocol):
    """What an objective answers."""

    num_samples: int
    """S: how many z are drawn for each x."""
    couples_rows: bool
    """Whether the loss of one row depends on the others of its batch. With several processes it
    gathers them (`joined_over_ranks`)."""

    def __call__(self, terms: Terms, position: Tensor, seed: Tensor) -> Tensor:
        """The loss of each row, `[B]`; `position` int64 `[B]` counts the samples met before, `seed`
        is for `fastvae.noise.stream`."""


@part("objective", "elbo")
class ELBO(nn.Module):
    """mean over z of nll, plus a weighted KL.

    - β·kl (Higgins et al. 2017); β = 1 is the ELBO.
    - β rises linearly from 0 over `warmup_samples`, again in each `cycle_samples` if that is not 0
      (Fu et al. 2019).
    - `free_bits` λ: Σ_d max(λ, kl_d), so that a latent costs nothing up to λ nats (Kingma et al.
      2016, appendix C.8; here for each image, so that a loss never depends on its neighbours).
    - `capacity` C: β·|kl − C|, C rising linearly from 0 over `capacity_samples` (Burgess et al.
      2018, eq. 8; for each image as well).
    """

    couples_rows = False

    def __init__(
        self,
        beta: float = 1.0,
        warmup_samples: int = 0,
        cycle_samples: int = 0,
        free_bits: float = 0.0,
        capacity: float = 0.0,
        capacity_samples: int = 0,
        num_samples: int = 1,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.warmup_samples = warmup_samples
        self.cycle_samples = cycle_samples
        self.free_bits = free_bits
        self.capacity = capacity
        self.capacity_samples = capacity_samples
        self.num_samples = num_samples

    def kl_weight(self, position: Tensor) -> Tensor:
        """β at the given numbers of samples met before: int64 `[…]` → float32 `[…]`."""
        if self.cycle_samples:
            position = position % self.cycle_samples
        return self.beta * _ramp(position, self.warmup_samples)

    def forward(self, terms: Terms, position: Tensor, seed: Tensor) -> Tensor:
        kl = terms.kl
        if self.free_bits:
            assert terms.p is not None
            if not isinstance(terms.q, LatentGaussian):
                raise UserError(
                    "free bits need the KL of each latent: a diagonal Gaussian posterior"
                )
            kl = terms.p.kl_of_each_latent(terms.q).clamp(min=self.free_bits).sum(1)
        if self.capacity:
            kl = (kl - self.capacity * _ramp(position, self.capacity_samples)).abs()
        return terms.mean_nll + self.kl_weight(position) * kl


@part("objective", "importance-weighted")
class ImportanceWeighted(nn.Module):
    """Tighter bounds from K draws: −log (1/K) Σ_k w_k with w = p(x, z) / q(z | x).

    One class for the family, by its settings:

    - IWAE (Burda et al. 2016): `num_samples` = K.
    - MIWAE (Rainforth et al. 2018): `groups` = M means of K draws each; S = M·K.
    - CIWAE (same): `elbo_share` β of the ELBO and 1 − β of the above.
    - DReG (Tucker et al. 2019): `doubly_reparameterized`, the same expected gradient with less
      noise for the encoder.
    - PIWAE (Rainforth et al. 2018): `decoder_all`, the decoder follows one mean over all S draws,
      the encoder the groups' means. It implies DReG's form of the encoder's gradient.
    """

    couples_rows = False

    def __init__(
        self,
        num_samples: int = 5,
        groups: int = 1,
        elbo_share: float = 0.0,
        doubly_reparameterized: bool = False,
        decoder_all: bool = False,
    ) -> None:
        """`num_samples` is S, all draws of z for an image: K = S / groups to a mean."""
        super().__init__()
        if num_samples < 1 or groups < 1 or num_samples % groups:
            raise UserError(
                f"the draws divide evenly among the groups, got {num_samples} and {groups}"
            )
        if not 0.0 <= elbo_share <= 1.0:
            raise UserError(f"elbo_share lies in [0, 1], got {elbo_share}")
        self.num_samples = num_samples
        self.groups = groups
        self.elbo_share = elbo_share
        if doubly_reparameterized or decoder_all:
            # Opaque to the compiler's front end, which before torch 2.12 or so moves a hook to
            # where its tensor is made, and that is before its weights are; what comes after it runs
            # this with autograd's graph. Here, since it imports the compiler.
            torch.compiler.allow_in_graph(_weighted_sum)
        self.doubly_reparameterized = doubly_reparameterized
        self.decoder_all = decoder_all

    def bound(self, log_weights: Tensor, groups: int) -> Tensor:
        """The bound of each row: `[S, B]` → `[B]`."""
        per_group = log_weights.unflatten(0, (groups, -1))
        grouped = torch.logsumexp(per_group, dim=1) - math.log(per_group.shape[1])
        share = self.elbo_share
        return share * log_weights.mean(0) + (1.0 - share) * grouped.mean(0)

    def weights(self, log_weights: Tensor, groups: int, power: int) -> Tensor:
        """Each draw's share of the bound's gradient, `[S, B]`: with `power` 1 that of log w, with 2
        that of log w through z in DReG."""
        per_group = log_weights.unflatten(0, (groups, -1))
        normalized = torch.softmax(per_group, dim=1).flatten(0, 1)
        share = self.elbo_share
        return share / len(log_weights) + (1.0 - share) * normalized**power / groups

    def forward(self, terms: Terms, position: Tensor, seed: Tensor) -> Tensor:
        if not (self.doubly_reparameterized or self.decoder_all):
            return -self.bound(terms.log_weights(), self.groups)
        log_weights = terms.log_weights(path_only=True)
        found = log_weights.detach()
        decoder_groups = 1 if self.decoder_all else self.groups
        # A draw that the decoder ignores may still matter to the encoder, by the ratio of both.
        for_decoder = self.weights(found, decoder_groups, 1).clamp(min=1e-20)
        for_encoder = self.weights(found, self.groups, 2)
        assert terms.z is not None
        surrogate = -_weighted_sum(log_weights, for_decoder, terms.z, for_encoder)
        # The value is the bound's, the gradient the surrogate's.
        return surrogate + (-self.bound(found, decoder_groups) - surrogate).detach()


@part("objective", "total-correlation")
class TotalCorrelation(nn.Module):
    """β-TCVAE (Chen et al. 2018, eq. 4): the KL's three parts with weights of their own,
    nll + α·MI + β·TC + γ·Σ_d KL(q(z_d) ‖ p(z_d)), by minibatch-weighted sampling (eq. S3)."""

    couples_rows = True
    num_samples = 1

    def __init__(
        self,
        dataset_size: int,
        mutual_information: float = 1.0,
        total_correlation: float = 6.0,
        dimension_wise: float = 1.0,
    ) -> None:
        super().__init__()
        self.dataset_size = dataset_size
        self.mutual_information = mutual_information
        self.total_correlation = total_correlation
        self.dimension_wise = dimension_wise

    def forward(self, terms: Terms, position: Tensor, seed: Tensor) -> Tensor:
        assert terms.z is not None and terms.p is not None
        if not isinstance(terms.q, LatentGaussian):
            raise UserError("the total correlation needs a diagonal Gaussian posterior")
        z_BD = terms.z[0].float()
        q = LatentGaussian(terms.q.mu.float(), terms.q.logvar.float())
        # log q(z_i | x_j) of each latent: rows i, columns j, which are those of all processes.
        mu_AD, logvar_AD = joined_over_ranks(q.mu), joined_over_ranks(q.logvar)
        apart_BAD = (z_BD.unsqueeze(1) - mu_AD) * torch.exp(-0.5 * logvar_AD)
        log_q_BAD = -0.5 * (apart_BAD.square() + logvar_AD + math.log(2 * math.pi))
        scale = math.log(len(mu_AD) * self.dataset_size)
        log_q_z_given_x = q.log_prob(z_BD)
        log_q_z = torch.logsumexp(log_q_BAD.sum(2), dim=1) - scale
        log_q_each = (torch.logsumexp(log_q_BAD, dim=1) - scale).sum(1)
        log_p_z = terms.p.log_prob(z_BD)
        return (
            terms.mean_nll
            + self.mutual_information * (log_q_z_given_x - log_q_z)
            + self.total_correlation * (log_q_z - log_q_each)
            + self.dimension_wise * (log_q_each - log_p_z)
        )


@part("objective", "mmd")
class MMD(nn.Module):
    """nll + β·kl + λ·MMD²(q(z), p(z)), with a batch of z against as many draws of the prior.

    InfoVAE (Zhao et al. 2019, eq. 6): β = 1 − α and λ = α + λ' − 1 in its letters. WAE-MMD
    (Tolstikhin et al. 2018, algorithm 2): β = 0. The kernel is a sum of inverse multiquadrics
    C / (C + |a − b|²) with C = 2·D·s, s ∈ {0.1, 0.2, 0.5, 1, 2, 5, 10}, as in the latter's code;
    the estimate is unbiased, so it may fall below 0.
    """

    couples_rows = True
    SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

    def __init__(self, mmd_weight: float = 10.0, beta: float = 1.0, num_samples: int = 1) -> None:
        super().__init__()
        self.mmd_weight = mmd_weight
        self.beta = beta
        self.num_samples = num_samples

    def forward(self, terms: Terms, position: Tensor, seed: Tensor) -> Tensor:
        assert terms.z is not None and terms.p is not None
        z = joined_over_ranks(terms.z[0].float())  # of the whole batch, as the prior's draws
        first = joined_over_ranks(position)[:1]
        drawn = terms.p.sample(len(z), noise.stream(seed, noise.MATCH), z.device, offset=first)
        return terms.mean_nll + self.beta * terms.kl + self.mmd_weight * self.mmd(z, drawn)

    def mmd(self, a: Tensor, b: Tensor) -> Tensor:
        """The unbiased estimate of MMD² between two sets of n ≥ 2 points `[n, D]`: 0-d."""
        n, D = a.shape
        if n < 2:
            raise UserError("the MMD compares batches of at least 2 images")

        def similarity(x: Tensor, y: Tensor) -> Tensor:
            # The norm of the difference, not its expansion: equal points are at distance 0.
            distance = (x.unsqueeze(1) - y).square().sum(2)
            return sum(
                (c / (c + distance) for c in (2.0 * D * s for s in self.SCALES)),
                start=torch.zeros_like(distance),
            )

        ones = float(len(self.SCALES))  # each point's likeness with itself, left out
        within = similarity(a, a).sum() + similarity(b, b).sum() - 2 * n * ones
        return within / (n * (n - 1)) - 2.0 * similarity(a, b).mean()


def _weighted_sum(
    log_weights_SB: Tensor, weights_SB: Tensor, z_SBD: Tensor, weights_through_z_SB: Tensor
) -> Tensor:
    """Σ_s w_s log w_s, `[B]`, whose gradient on every path through z has the other weights."""
    if z_SBD.requires_grad:
        ratio_SB1 = (weights_through_z_SB / weights_SB).unsqueeze(-1)
        # In float32: with decoder_all the ratio may exceed what a half can hold.
        z_SBD.register_hook(lambda gradient: (gradient * ratio_SB1).to(gradient.dtype))
    return (weights_SB * log_weights_SB).sum(0)


def _ramp(position: Tensor, samples: int) -> Tensor:
    """From 0 to 1 over so many samples; 1 at once if they are 0. float32."""
    if samples == 0:
        return torch.ones_like(position, dtype=torch.float32)
    return (position.float() / samples).clamp(max=1.0)
