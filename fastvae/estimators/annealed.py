"""log p(x) by annealed importance sampling: no encoder takes part.

A chain walks from the prior to the posterior through p_t(z) ∝ p(z) p(x | z)^t and collects a weight
whose expectation is p(x) (Neal 2001; for decoders, Wu et al. 2017, arXiv:1611.04273). Between two
temperatures it takes one Hamiltonian Monte Carlo move.

The expectation is p(x) only for moves that do not look at the chain's own past. Step sizes adapted
by the chain that takes them, as is usual, raise the estimate, by a tenth of a nat where it could be
measured. Here a few pilot chains of each image set the step sizes, and the others, which use them,
are averaged.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from fastvae_kernels import normal, uniform
from torch import Tensor

from fastvae.errors import UserError
from fastvae.estimators.importance import importance_log_marginal
from fastvae.noise import derived_seed

LogDensity = Callable[[Tensor], Tensor]  # z [S, B, D] -> [S, B], nats

TARGET_ACCEPTANCE = 0.65  # Wu et al. 2017; Neal 2011, "MCMC using Hamiltonian dynamics"
_GAIN = 0.2  # of log step size per unit of acceptance: at most +7 % or −12 % in a move


class AnnealedEstimate(NamedTuple):
    """log p(x) of each of B images by chains of T − 1 moves.

    Attributes:
        log_marginal, standard_error, effective_sample_size: `[B]`, as in `importance.Estimate`,
            over the chains that are no pilots. An effective sample size near 1 asks for more steps.
        acceptance: `[B]`, the share of their moves that were accepted; nan if none was made.
        step_sizes: `[T − 1, B]`, the step size of each move.
    """

    log_marginal: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor
    acceptance: Tensor
    step_sizes: Tensor


class _State(NamedTuple):
    """Where the chains are, with what the path needs to know there."""

    z: Tensor
    log_likelihood: Tensor
    log_prior: Tensor
    likelihood_gradient: Tensor
    prior_gradient: Tensor

    def log_density(self, t: float) -> Tensor:
        return self.log_prior + t * self.log_likelihood

    def gradient(self, t: float) -> Tensor:
        return self.prior_gradient + t * self.likelihood_gradient


@torch.no_grad()
def annealed_log_marginal(
    log_likelihood: LogDensity,
    log_prior: LogDensity,
    initial_z: Tensor,
    *,
    steps: int,
    leapfrog_steps: int = 10,
    pilots: int = 4,
    step_size: float = 0.1,
    seed: int,
    offset: int = 0,
) -> AnnealedEstimate:
    """log p(x) ≈ log mean_s w_s with w_s = Π_k p(x | z_{k-1})^(t_k − t_{k-1}) along chain s.

    exp(log_marginal) is an unbiased estimate of p(x), and log_marginal therefore on average a
    lower bound of log p(x) that rises to it with the number of steps.

    Costs S · (T − 1) · L gradients of the decoder for each image. Works in the dtype of
    `initial_z`; weights are collected in float64. All noise of row b is a function of
    (seed, offset + b) alone, given S and D, so that batches and ranks change nothing.

    Args:
        log_likelihood, log_prior: log p(x | z) and log p(z), nats, `[S, B, D]` → `[S, B]`,
            differentiable in z.
        initial_z: `[S, B, D]` independent draws of the prior, S chains for each image.
        steps: T, the temperatures above 0. One step is the average over prior draws.
        leapfrog_steps: L, the leapfrog steps in a move.
        pilots: how many of the S chains, the first, only steer the step size of their image
            towards 65 % accepted moves. 0 keeps `step_size` throughout.
        step_size: of the first move.
        seed: of momenta and acceptances; not the one `initial_z` was drawn with.
        offset: the global position of row 0.

    Raises:
        UserError: for numbers out of range or shapes that do not fit.
    """
    _check(initial_z, steps, leapfrog_steps, pilots, step_size)
    chains, rows, _ = initial_z.shape
    log_weight = torch.zeros(chains, rows, dtype=torch.float64, device=initial_z.device)
    accepted_moves = torch.zeros_like(log_weight)
    step_sizes = initial_z.new_full((steps - 1, rows), step_size)

    state = _evaluate(log_likelihood, log_prior, initial_z)
    for move, (last_t, t) in enumerate(pairwise(sigmoidal_schedule(steps))):
        log_weight += (t - last_t) * state.log_likelihood.double()
        if t == 1:  # a move after the last weight would change nothing
            break
        momentum = _row_noise(normal, initial_z.shape, ("momentum", seed, move), offset, initial_z)
        threshold = _row_noise(
            uniform, (chains, rows, 1), ("acceptance", seed, move), offset, initial_z
        ).squeeze(-1)
        proposal, log_ratio = _leapfrog(
            log_likelihood, log_prior, state, momentum, step_sizes[move], leapfrog_steps, t
        )
        # A trajectory that left for infinity has a ratio of nan and is turned down.
        probability = log_ratio.nan_to_num(nan=-torch.inf).clamp(max=0).exp()
        accepted = threshold < probability
        state = _choose(accepted, proposal, state)
        accepted_moves += accepted
        if pilots:
            change = _GAIN * (probability[:pilots].mean(0) - TARGET_ACCEPTANCE)
            step_sizes[move + 1 : move + 2] = step_sizes[move] * change.exp()

    log_weight, accepted_moves = log_weight[pilots:], accepted_moves[pilots:]
    estimate = importance_log_marginal(
        lambda start, count: log_weight[start : start + count], len(log_weight), len(log_weight)
    )
    return AnnealedEstimate(*estimate, accepted_moves.mean(0) / (steps - 1), step_sizes)


def sigmoidal_schedule(steps: int, steepness: float = 4.0) -> list[float]:
    """0 = t_0 < … < t_T = 1, dense at both ends: σ(δ (2k/T − 1)), shifted and scaled (Wu et al.).

    The ends are where the path bends: near 0 the likelihood sets in, near 1 it sets hard.
    """
    sigmoid = torch.linspace(-steepness, steepness, steps + 1, dtype=torch.float64).sigmoid()
    t = (sigmoid - sigmoid[0]) / (sigmoid[-1] - sigmoid[0])
    return [*t[:-1].tolist(), 1.0]


def _evaluate(log_likelihood: LogDensity, log_prior: LogDensity, z: Tensor) -> _State:
    # Both gradients are kept apart, so that a chain which stays needs no new one at the next t.
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        likelihood, prior = log_likelihood(z), log_prior(z)
        for name, value in (("log_likelihood", likelihood), ("log_prior", prior)):
            if value.shape != z.shape[:-1]:
                raise UserError(
                    f"{name} of z {tuple(z.shape)} must be {tuple(z.shape[:-1])}, "
                    f"got {tuple(value.shape)}"
                )
        (likelihood_gradient,) = torch.autograd.grad(likelihood.sum(), z)
        (prior_gradient,) = torch.autograd.grad(prior.sum(), z)
    return _State(
        z.detach(), likelihood.detach(), prior.detach(), likelihood_gradient, prior_gradient
    )


def _leapfrog(
    log_likelihood: LogDensity,
    log_prior: LogDensity,
    state: _State,
    momentum: Tensor,
    step: Tensor,
    leapfrog_steps: int,
    t: float,
) -> tuple[_State, Tensor]:
    """The end of a trajectory with unit mass, and its log acceptance ratio `[S, B]`."""
    start = state.log_density(t) - _kinetic(momentum)
    step = step.unsqueeze(-1)  # [B, 1], the same for all chains of an image
    momentum = momentum + 0.5 * step * state.gradient(t)
    for k in range(leapfrog_steps):
        state = _evaluate(log_likelihood, log_prior, state.z + step * momentum)
        last = k == leapfrog_steps - 1
        momentum = momentum + (0.5 if last else 1.0) * step * state.gradient(t)
    return state, state.log_density(t) - _kinetic(momentum) - start


def _kinetic(momentum: Tensor) -> Tensor:
    return 0.5 * momentum.square().sum(-1)


def _choose(accepted: Tensor, proposal: _State, current: _State) -> _State:
    def chosen(new: Tensor, old: Tensor) -> Tensor:
        where = accepted.unsqueeze(-1) if new.dim() == 3 else accepted
        return torch.where(where, new, old)

    return _State(*map(chosen, proposal, current))


def _row_noise(
    draw: Callable[..., Tensor],
    shape: tuple[int, ...],
    purpose: tuple[object, ...],
    offset: int,
    like: Tensor,
) -> Tensor:
    """`[S, B, D]` noise of which `[:, b]` is a function of (purpose, offset + b)."""
    chains, rows, columns = shape
    noise = draw((rows, chains, columns), derived_seed(*purpose), offset=offset, device=like.device)
    return noise.transpose(0, 1).to(like.dtype)


def _check(z: Tensor, steps: int, leapfrog_steps: int, pilots: int, step_size: float) -> None:
    if z.dim() != 3 or not z.is_floating_point():
        raise UserError(f"initial_z must be floating [S, B, D], got {z.dtype} {tuple(z.shape)}")
    if steps < 1 or leapfrog_steps < 1 or not step_size > 0:
        raise UserError(
            "steps and leapfrog_steps must be at least 1 and step_size above 0, "
            f"got {steps}, {leapfrog_steps} and {step_size}"
        )
    if not 0 <= pilots < len(z):
        raise UserError(
            f"of {len(z)} chains 0 to {len(z) - 1} can be pilots, got {pilots}: start more chains"
        )
