"""Everything `fastvae evaluate` measures of a VAE, as one JSON-able dictionary, and its figures."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvae import estimators, figures, noise
from fastvae.batch import Batch
from fastvae.data import ImageSet
from fastvae.errors import UserError
from fastvae.evaluation import quantity_names
from fastvae.files import without_nan
from fastvae.noise import derived_seed
from fastvae.parts.networks import pixels
from fastvae.ranks import Share
from fastvae.scores import Scores, activation_numbers, score, scoring_seed
from fastvae.vae import VAE

BATCH = 500
FRECHET_IMAGES = 5000
SHOWN = 64


@dataclass(frozen=True)
class Effort:
    """How much work an evaluation may do."""

    iw_samples: int = 100
    """Draws of z for each image in the importance-weighted likelihood."""
    annealed_images: int = 0
    """Images whose log p(x) is also estimated by annealed importance sampling (0: none)."""
    annealed_chains: int = 20
    """Chains for each of them, 4 of which only set the step sizes."""
    annealed_steps: int = 500
    """Temperatures between prior and posterior."""
    prior_samples: int = 0
    """Draws of the prior in a plain average for the same images; for a few latents (0: none)."""
    memory_mb: int = 1024
    """Memory that images × draws may take at once."""

    def __post_init__(self) -> None:
        for name in ("iw_samples", "memory_mb", "annealed_steps"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}"
                )
        for name in ("annealed_images", "prior_samples"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"--{name.replace('_', '-')} must be 0 (off) or more, got {getattr(self, name)}"
                )
        if self.annealed_chains < 5:
            raise UserError(
                "--annealed-chains must be at least 5 (4 only set the step sizes), "
                f"got {self.annealed_chains}"
            )
        if self.prior_samples and not self.annealed_images:
            raise UserError(
                "--prior-samples averages over the images of --annealed-images: give it too"
            )


def assess(
    vae: VAE,
    heldout: ImageSet,
    train_set: ImageSet | None,
    effort: Effort,
    *,
    seed: int,
    folder: Path | None = None,
    keep: Callable[[Scores], None] | None = None,
    share: Share | None = None,
) -> dict[str, Any]:
    """Measure a model on held-out images, on all processes, and draw its figures into `folder`.

    `train_set` is what a linear probe is fitted on; without it there is none. `keep` is given the
    scores of each image, on the main process. All noise is a function of (seed, image). Raises
    UserError where memory or labels do not suffice.
    """
    share = share or Share(len(heldout))
    was_training = vae.training
    vae.eval()
    try:
        result = _assess(vae, heldout, train_set, effort, seed, folder, keep, share)
    finally:
        vae.train(was_training)
    return without_nan(result)


def _assess(
    vae: VAE,
    heldout: ImageSet,
    train_set: ImageSet | None,
    effort: Effort,
    seed: int,
    folder: Path | None,
    keep: Callable[[Scores], None] | None,
    share: Share,
) -> dict[str, Any]:
    scores = score(
        vae,
        heldout,
        seed=scoring_seed(seed),
        samples=effort.iw_samples,
        memory_bytes=effort.memory_mb * 2**20,
        share=share,
    )
    result = _bounds(vae, heldout, scores, effort)
    estimates = _second_opinions(vae, heldout, scores, effort, seed, share)
    result |= estimates
    result["latents"] = _latents(vae, scores, seed)
    result["reconstruction"] = _reconstruction(vae, heldout, scores, share)
    if share.is_main:
        if keep is not None:
            keep(scores)
        if train_set is not None and train_set.labels is not None and heldout.labels is not None:
            result["linear_probe"] = _probe(vae, train_set, heldout, scores, seed)
        result["frechet"] = _frechet(vae, heldout, seed)
        if folder is not None:
            draw(vae, heldout, scores, result, folder, seed=seed)
    result["units"] = (
        "nats per image, means over images, with standard errors over images; bits_per_dim in bits"
    )
    return result


# ------------------------------------------------------------------------------------- bounds


def _bounds(vae: VAE, heldout: ImageSet, scores: Scores, effort: Effort) -> dict[str, Any]:
    names = quantity_names(vae.likelihood.is_density, vae.is_bound)
    elbo = estimators.mean_and_standard_error(scores.elbo)
    result: dict[str, Any] = {
        "data": heldout.name,
        "images": len(heldout),
        names["elbo"]: elbo.mean,
        f"{names['elbo']}_standard_error": elbo.standard_error,
        names["nll"]: scores.nll.mean().item(),
        "kl": scores.kl.mean().item(),
        "draws": effort.iw_samples if vae.posterior.is_distribution else 1,
    }
    if not vae.is_bound:
        result["bound"] = "none: " + (
            "the posterior is deterministic" if vae.likelihood.is_density else "cross-entropy"
        )
        return result
    in_bits = _bits(vae, heldout)
    if in_bits:
        result["bits_per_dim"] = in_bits(-elbo.mean)
    if scores.first_elbo is not None:
        gap = scores.elbo - scores.first_elbo
        found = estimators.mean_and_standard_error(gap)
        result["amortization_gap"] = {
            "nats": found.mean,
            "standard_error": found.standard_error,
            "elbo_before_refinement": scores.first_elbo.mean().item(),
            "refinement_steps": vae.refinement.steps if vae.refinement else 0,
            "begins_at": "the prior" if vae.reads_index else "the encoder's answer",
        }
    assert scores.log_marginal is not None and scores.log_marginal_error is not None
    assert scores.effective_samples is not None
    weighted = estimators.mean_and_standard_error(-scores.log_marginal)
    result["importance_weighted"] = {
        "samples": effort.iw_samples,
        "nll": weighted.mean,
        "standard_error": weighted.standard_error,
        "standard_error_of_draws": _rms_mean(scores.log_marginal_error),
        "effective_samples_median": scores.effective_samples.median().item(),
        **({"bits_per_dim": in_bits(weighted.mean)} if in_bits else {}),
    }
    return result


def _bits(vae: VAE, heldout: ImageSet) -> Callable[[float], float] | None:
    """From nats per image to bits per dimension, where the values were stored in steps."""
    if vae.likelihood.bits_offset and heldout.images.is_floating_point():
        return None
    dimensions = math.prod(vae.image_shape)
    return lambda nats: nats / (math.log(2) * dimensions) + vae.likelihood.bits_offset


def _rms_mean(errors: Tensor) -> float:
    """The standard error of a mean of independent estimates with these standard errors."""
    return errors.square().sum().sqrt().item() / len(errors)


# -------------------------------------------------- estimates that do not ask the encoder


def _second_opinions(
    vae: VAE, heldout: ImageSet, scores: Scores, effort: Effort, seed: int, share: Share
) -> dict[str, Any]:
    if not effort.annealed_images:
        return {}
    if not vae.is_bound:
        raise UserError(
            "--annealed-images estimates log p(x), and this model has none: its posterior is "
            "deterministic or its likelihood a cross-entropy"
        )
    count = min(effort.annealed_images, len(heldout))
    part = Share(count, share.accelerator)
    device = next(vae.parameters()).device
    observe_seed = noise.stream(scoring_seed(seed), noise.OBSERVE)
    rows = max(1, _rows_in_memory(vae, effort, effort.annealed_chains))
    annealed: list[Tensor] = []
    averaged: list[Tensor] = []
    for cut in part.batches(rows):
        taken = heldout.select(cut).to(device)
        with torch.no_grad():
            x = vae.likelihood.observe(taken.tensor, observe_seed, cut.start)
            condition = vae.condition(taken.labels)
            p = vae.prior_of(condition)

        def log_likelihood(z: Tensor, x: Tensor = x, condition: Any = condition) -> Tensor:
            draws = len(z)
            repeated = None if condition is None else condition.repeat(draws, 1)
            parameters = vae.parameters_of(z.flatten(0, 1), repeated)
            return -vae.likelihood.nll(parameters, x.repeat(draws, 1, 1, 1), vae.impl).view(
                draws, -1
            )

        def prior_draws(start: int, count: int, p: Any = p, cut: slice = cut) -> Tensor:
            size = cut.stop - cut.start
            return torch.stack(
                [
                    p.sample(
                        size, derived_seed("prior draw", seed, start + s), device, offset=cut.start
                    )
                    for s in range(count)
                ]
            )

        found = estimators.annealed_log_marginal(
            log_likelihood,
            p.log_prob,
            prior_draws(0, effort.annealed_chains),
            steps=effort.annealed_steps,
            seed=derived_seed("annealing", seed),
            offset=cut.start,
        )
        annealed.append(
            torch.stack(
                [
                    found.log_marginal,
                    found.standard_error,
                    found.acceptance.double(),
                    found.effective_sample_size,
                ],
                dim=1,
            )
        )
        if effort.prior_samples:
            chunk = max(1, effort.annealed_chains)
            average = estimators.prior_average_log_marginal(
                log_likelihood, prior_draws, effort.prior_samples, chunk
            )
            averaged.append(
                torch.stack(
                    [average.log_marginal, average.standard_error, average.effective_sample_size],
                    dim=1,
                )
            )

    def gathered(found: list[Tensor], columns: int) -> Tensor:
        mine = torch.cat(found) if found else torch.zeros(0, columns, device=device)
        return part.joined(mine.double()).cpu()

    assert scores.log_marginal is not None
    whole = gathered(annealed, 4)
    result: dict[str, Any] = {
        "annealed": {
            "images": count,
            "chains": effort.annealed_chains,
            "steps": effort.annealed_steps,
            "nll": -whole[:, 0].mean().item(),
            "standard_error_of_draws": _rms_mean(whole[:, 1]),
            "acceptance": whole[:, 2].mean().item(),
            "effective_chains_median": whole[:, 3].median().item(),
            "elbo_of_the_same_images": scores.elbo[:count].mean().item(),
            "importance_weighted_nll_of_the_same_images": -scores.log_marginal[:count]
            .mean()
            .item(),
        }
    }
    if effort.prior_samples:
        whole = gathered(averaged, 3)
        result["prior_average"] = {
            "images": count,
            "samples": effort.prior_samples,
            "nll": -whole[:, 0].mean().item(),
            "standard_error_of_draws": _rms_mean(whole[:, 1]),
            "effective_samples_median": whole[:, 2].median().item(),
        }
    return result


def _rows_in_memory(vae: VAE, effort: Effort, chains: int) -> int:
    # A gradient keeps what a forward pass may let go, and a proposal lives beside its chain.
    numbers = 3 * activation_numbers(vae) * chains * 4
    rows = effort.memory_mb * 2**20 // numbers
    if rows < 1:
        raise UserError(
            f"--memory-mb {effort.memory_mb} is too little for {chains} annealed chains of one "
            f"image: allow {-(-numbers // 2**20)} or take fewer --annealed-chains"
        )
    return min(rows, BATCH)


# ------------------------------------------------------------------------------------ latents


@torch.no_grad()
def _latents(vae: VAE, scores: Scores, seed: int) -> dict[str, Any]:
    mu = scores.latents.mu
    result: dict[str, Any] = {"latent_dim": vae.latent_dim}
    if len(mu) > 1:
        result["active_units"] = int(estimators.active_units(mu).sum())
        result["active_units_rule"] = "variance over images of the posterior mean above 0.01"
    if scores.kl_of_each_latent is not None:
        result["kl_of_each_latent"] = scores.kl_of_each_latent.mean(0).tolist()
    if vae.posterior.is_gaussian and not vae.num_classes:
        device = next(vae.parameters()).device
        p = vae.prior_of(None)

        def log_prior(z: Tensor) -> Tensor:
            return p.log_prob(z.to(device)).cpu()

        surgery = estimators.elbo_surgery(*scores.latents, log_prior, seed=scoring_seed(seed))
        result["mutual_information"] = surgery.mutual_information
        result["marginal_kl"] = surgery.marginal_kl
        result["mutual_information_ceiling"] = surgery.ceiling
    return result


# ------------------------------------------------------------------------------------- images


@torch.no_grad()
def _reconstructed(vae: VAE, data: ImageSet, scores: Scores, cut: slice) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and E[x | z] at the mean of q, for the rows of `cut`."""
    device = next(vae.parameters()).device
    taken = data.select(cut).to(device)
    z = scores.latents.mu[cut].to(device)
    labels = taken.labels if vae.num_classes else None
    return pixels(taken.tensor), vae.decode(z, labels)


def _reconstruction(vae: VAE, heldout: ImageSet, scores: Scores, share: Share) -> dict[str, Any]:
    device = next(vae.parameters()).device
    metrics = estimators.ReconstructionMetrics(vae.image_shape, device)
    for cut in share.batches(BATCH):
        metrics.update(*_reconstructed(vae, heldout, scores, cut))
    metrics.totals = share.summed(metrics.totals)
    return metrics.compute()._asdict()


def _probe(
    vae: VAE, train_set: ImageSet, heldout: ImageSet, scores: Scores, seed: int
) -> dict[str, Any]:
    assert train_set.labels is not None and heldout.labels is not None
    train_mu, train_labels = training_means(vae, train_set, 10_000, seed)
    assert train_labels is not None
    try:
        found = estimators.linear_probe(
            train_mu, train_labels, scores.latents.mu, heldout.labels, seed=seed
        )
    except UserError as error:
        return {"unavailable": str(error)}
    return found._asdict()


@torch.no_grad()
def training_means(
    vae: VAE, train_set: ImageSet, most: int, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Means of q for at most so many training images, evenly spaced: `[n, D]`, and their labels.

    Of the images as they are observed, binarised where the model binarises, like those of `score`.
    """
    device = next(vae.parameters()).device
    vae.check_labels(train_set.labels)
    count = min(most, len(train_set))
    chosen = torch.arange(count) * len(train_set) // count
    means = []
    for start, part in enumerate(chosen.split(BATCH)):
        taken = train_set.select(part).to(device)
        batch = Batch(taken.tensor, taken.labels, part.to(device) if vae.reads_index else None)
        found = vae.infer(batch, derived_seed("training means", seed), start * BATCH)
        means.append(vae.posterior.moments(found.statistics).mu.float().cpu())
    labels = train_set.labels
    return torch.cat(means), None if labels is None else labels[chosen]


@torch.no_grad()
def _frechet(vae: VAE, heldout: ImageSet, seed: int) -> dict[str, Any]:
    """Between as many samples as held-out images, where the network's weights are at hand."""
    device = next(vae.parameters()).device
    features = estimators.inception_features(device=device)
    if isinstance(features, str):
        return {"unavailable": features}
    if not vae.prior.is_distribution:
        return {"unavailable": "the model has no prior to draw samples from"}
    if vae.image_shape[0] not in (1, 3):
        return {
            "unavailable": f"images have {vae.image_shape[0]} channels, the network takes 1 or 3"
        }
    count = min(len(heldout), FRECHET_IMAGES)
    if count < 2:
        return {"unavailable": "it compares covariances, which take at least two images"}
    labels = heldout.labels[:count] if vae.num_classes and heldout.labels is not None else None
    samples = vae.sample(count, seed=seed, labels=labels).clamp(0, 1)
    real = pixels(heldout.select(slice(count)).loaded().tensor)
    found = estimators.frechet_distance(
        torch.cat([features.extract(part) for part in real.split(100)]),
        torch.cat([features.extract(part) for part in samples.split(100)]),
        name=features.name,
    )
    return found._asdict()


# ------------------------------------------------------------------------------------ figures


@torch.no_grad()
def draw(
    vae: VAE,
    heldout: ImageSet,
    scores: Scores,
    result: dict[str, Any],
    folder: Path,
    *,
    seed: int,
) -> list[str]:
    """Write the figures that make sense for the model into `folder`; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    device = next(vae.parameters()).device
    latents = scores.latents
    shown = slice(0, min(SHOWN, len(heldout)))
    figures.save_pairs(*_reconstructed(vae, heldout, scores, shown), folder / "reconstructions.png")
    if vae.prior.is_distribution:
        figures.save_grid(vae.sample(SHOWN, seed=seed), folder / "samples.png", columns=8)
    label = (
        heldout.labels[:1].to(device) if vae.num_classes and heldout.labels is not None else None
    )

    def decode(z: Tensor) -> Tensor:
        return vae.decode(z.to(device), None if label is None else label.expand(len(z)))

    pairs = latents.mu[: min(16, len(heldout)) // 2 * 2].unflatten(0, (-1, 2))
    if len(pairs):
        figures.save_interpolations(decode, pairs, folder / "interpolations.png")
    if scores.kl_of_each_latent is not None:
        kl = scores.kl_of_each_latent.mean(0)
        figures.save_latent_kl(kl, folder / "latent_kl.png")
        scale = latents.mu.std(0) if len(latents.mu) > 1 else torch.ones_like(latents.mu[0])
        figures.save_traversals(decode, latents.mu[0], scale, kl, folder / "traversals.png")
    figures.save_latent_plane(latents.mu, heldout.labels, folder / "latent_plane.png")
    if vae.latent_dim == 2 and vae.prior.is_distribution:
        figures.save_manifold(decode, folder / "manifold.png")
    if vae.num_classes and vae.prior.is_distribution:
        labels = torch.arange(vae.num_classes).repeat_interleave(10)
        images = vae.sample(len(labels), seed=seed, labels=labels)
        figures.save_class_grid(images.unflatten(0, (vae.num_classes, 10)), folder / "classes.png")
    if "annealed" in result:
        _draw_bounds(result, folder / "bounds.png")
    return sorted(file.name for file in folder.glob("*.png"))


def _draw_bounds(result: dict[str, Any], path: Path) -> None:
    annealed = result["annealed"]
    samples = result["importance_weighted"]["samples"]
    named: list[tuple[str, float, float | None]] = [
        ("ELBO", annealed["elbo_of_the_same_images"], None),
        (
            f"importance-weighted, {samples} draws",
            -annealed["importance_weighted_nll_of_the_same_images"],
            None,
        ),
        ("annealed importance sampling", -annealed["nll"], annealed["standard_error_of_draws"]),
    ]
    if average := result.get("prior_average"):
        named.append(
            (
                f"average over {average['samples']:,} prior draws",
                -average["nll"],
                average["standard_error_of_draws"],
            )
        )
    names, values, errors = zip(*named, strict=True)
    figures.save_bounds(names, values, errors, path)
