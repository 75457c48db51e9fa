"""What a model says of each image: its bound, its importance-weighted likelihood, its latents."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvae import noise
from fastvae.batch import Batch
from fastvae.compiler import compile_in_place
from fastvae.data import ImageSet
from fastvae.errors import UserError
from fastvae.estimators.importance import importance_log_marginal
from fastvae.parts.latents import LatentGaussian, MixturePrior
from fastvae.ranks import Share
from fastvae.vae import VAE

# Draws of z that go through the decoder together for one image: all noise is a function of the
# block's number, so that the memory allowed changes nothing.
BLOCK = 50
# More images at once gain nothing; on a CPU, nor do more than about its cache holds.
MOST_ROWS = 2000
CPU_BYTES = 64 * 2**20
# Decoded images from which compilation pays for its ten seconds or more. A GPU's figure is
# arithmetic and owed a measurement: 50 ns an image for a small decoder, of which a part is saved.
WORTH_COMPILING = {"cpu": 5_000_000, "cuda": 500_000_000}


class Scores(NamedTuple):
    """Of N images, in their order; float64 in nats where not said otherwise."""

    nll: Tensor
    """−E[log p(x | z)] over the draws, `[N]`."""
    kl: Tensor
    """KL(q ‖ p), `[N]`."""
    first_elbo: Tensor | None
    """The ELBO of the encoder's own answer, `[N]`, where the model refines it."""
    log_marginal: Tensor | None
    """log of the mean importance weight, `[N]`; None where q or p(x | z) is no density."""
    log_marginal_error: Tensor | None
    """Its standard error over the draws, `[N]`."""
    effective_samples: Tensor | None
    """(Σ w)² / Σ w², `[N]`."""
    latents: LatentGaussian
    """The moments of q, float32 `[N, D]` each."""
    kl_of_each_latent: Tensor | None
    """`[N, D]`, where the prior factorises and q is Gaussian."""

    @property
    def elbo(self) -> Tensor:
        """−(nll + kl), `[N]`: a bound where the model has one."""
        return -(self.nll + self.kl)


@torch.no_grad()
def score(
    vae: VAE,
    data: ImageSet,
    *,
    seed: int,
    samples: int = 1,
    memory_bytes: int = 2**30,
    share: Share | None = None,
    compile: bool | None = None,
) -> Scores:
    """Score every image with `samples` draws of z, in bounded memory.

    Image i meets noise that is a function of (seed, i) alone, so neither the memory nor the number
    of processes changes its scores. With `share`, each process scores its part and all get the
    whole. A deterministic posterior takes one draw. `compile`: whether to compile the decoder's
    pass; None decides by the amount of work.

    Raises:
        UserError: where one image does not fit in the memory, or a conditional model meets labels
            that are missing or no classes of it.
    """
    vae.check_labels(data.labels)
    was_training = vae.training
    vae.eval()
    try:
        return _score(vae, data, seed, samples, memory_bytes, share or Share(len(data)), compile)
    finally:
        vae.train(was_training)


def _score(
    vae: VAE,
    data: ImageSet,
    seed: int,
    samples: int,
    memory_bytes: int,
    share: Share,
    compile: bool | None,
) -> Scores:
    device = next(vae.parameters()).device
    samples = samples if vae.posterior.is_distribution else 1
    block = min(BLOCK, samples)
    weighs = vae.is_bound
    per_draw = activation_numbers(vae)
    rows = memory_bytes // (4 * per_draw * block)
    if rows < 1:
        raise UserError(
            f"{block} draws of z for one image take {4 * per_draw * block:,} bytes, more than the "
            f"{memory_bytes:,} allowed: allow more memory"
        )
    if device.type == "cpu":
        rows = min(rows, max(1, CPU_BYTES // (4 * per_draw * block)))
    rows = min(rows, share.last - share.first, MOST_ROWS)
    if compile is None:
        compile = samples * (share.last - share.first) > WORTH_COMPILING[device.type]
    terms = _BlockTerms(vae, block, weighs)
    if compile:
        compile_in_place(terms, required=False)

    columns: list[dict[str, Tensor]] = []
    for part in share.batches(rows):
        # A last batch of another size would be compiled again: it is filled up, then cut.
        indices = torch.arange(part.start, part.start + rows).clamp(max=share.last - 1)
        taken = data.select(indices if part.stop - part.start < rows else part).to(device)
        batch = Batch(taken.tensor, taken.labels)
        columns.append(
            {
                name: values[: part.stop - part.start]
                for name, values in _score_batch(
                    vae, terms, batch, part.start, seed, samples
                ).items()
            }
        )
    found = {
        name: share.joined(torch.cat([column[name] for column in columns])).cpu()
        for name in columns[0]
    }
    latents = LatentGaussian(found.pop("mu"), found.pop("logvar"))
    return Scores(
        nll=found["nll"],
        kl=found["kl"],
        first_elbo=found.get("first_elbo"),
        log_marginal=found.get("log_marginal"),
        log_marginal_error=found.get("error"),
        effective_samples=found.get("effective"),
        latents=latents,
        kl_of_each_latent=found.get("kl_of_each_latent"),
    )


class _BlockTerms(nn.Module):
    """nll, kl and log weights of a block of draws, for the compiler."""

    def __init__(self, vae: VAE, draws: int, weighs: bool) -> None:
        super().__init__()
        self.vae, self.draws, self.weighs = vae, draws, weighs

    def forward(
        self, statistics: Tensor, x: Tensor, condition: Tensor | None, seed: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`[draws, B]`, `[B]`, `[draws, B]`."""
        terms = self.vae.terms(statistics, x, condition, seed, offset, self.draws)
        return terms.nll, terms.kl, terms.log_weights() if self.weighs else terms.nll


def _score_batch(
    vae: VAE, terms: _BlockTerms, batch: Batch, offset: int, seed: int, samples: int
) -> dict[str, Tensor]:
    device = batch.x.device
    found = vae.infer(batch, seed, offset)
    place = torch.full((), offset, device=device)
    nll = torch.zeros(len(batch.x), dtype=torch.float64, device=device)
    kl = torch.zeros_like(nll)

    def log_weights(start: int, count: int) -> Tensor:
        nonlocal nll, kl
        block_seed = torch.full((), seed ^ (start // terms.draws), device=device)
        of_block = terms(found.statistics, found.x, found.condition, block_seed, place)
        nll += of_block[0][:count].double().sum(0)
        kl += of_block[1].double() * count
        return of_block[2][:count].double()

    estimate = importance_log_marginal(log_weights, samples, terms.draws)
    moments = vae.posterior.moments(found.statistics)
    columns = {
        "nll": nll / samples,
        "kl": kl / samples,
        "mu": moments.mu.float(),
        "logvar": moments.logvar.float(),
    }
    if terms.weighs:
        columns |= {
            "log_marginal": estimate.log_marginal,
            "error": estimate.standard_error,
            "effective": estimate.effective_sample_size,
        }
    if found.first_gradient is not None:
        first = terms(
            found.start, found.x, found.condition, torch.full((), seed, device=device), place
        )
        columns["first_elbo"] = -(first[0].double().mean(0) + first[1].double())
    if vae.posterior.is_gaussian and vae.prior.factorises:
        p = vae.prior_of(found.condition)
        columns["kl_of_each_latent"] = p.kl_of_each_latent(moments).double()
    return columns


@torch.no_grad()
def activation_numbers(vae: VAE) -> int:
    """How many numbers one draw of z holds on its way through the decoder and the likelihood."""
    numbers = 0

    def count(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal numbers
        if isinstance(output, Tensor):
            numbers += output.numel()

    leaves = [m for m in vae.decoder.modules() if not list(m.children())]
    handles = [leaf.register_forward_hook(count) for leaf in leaves]
    device = next(vae.parameters()).device
    z = torch.zeros(1, vae.latent_dim, device=device)
    condition = torch.zeros(1, vae.num_classes, device=device) if vae.num_classes else None
    try:
        parameters = vae.parameters_of(z, condition)
        p = vae.prior_of(condition)
    finally:
        for handle in handles:
            handle.remove()
    if isinstance(p, MixturePrior):  # every component is compared with every draw
        numbers += 4 * p.mu.numel()
    # The likelihood makes a few temporaries of its parameters' size; the image is repeated.
    return numbers + 4 * parameters.numel() + 2 * math.prod(vae.image_shape) + 8 * vae.latent_dim


def scoring_seed(seed: int) -> int:
    """The seed of an evaluation's noise, apart from the training's."""
    return noise.derived_seed("evaluation", seed)
