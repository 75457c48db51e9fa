"""The model: one final class composed of parts."""

from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from fastvae_kernels import Impl
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

# Imported for their registration as well.
from fastvae import noise as streams
from fastvae import saving
from fastvae.batch import Batch
from fastvae.errors import UserError
from fastvae.parts import DiagonalGaussian, StandardNormal, Terms
from fastvae.parts.latents import LatentGaussian
from fastvae.parts.likelihoods import Likelihood
from fastvae.parts.networks import ImageShape, pixels
from fastvae.parts.posteriors import Posterior
from fastvae.parts.priors import Prior
from fastvae.parts.spec import CUSTOM, build_part, spec_of
from fastvae.refinement import Refinement, refine
from fastvae.saving import CONFIG_NAME

PART_KINDS = ("encoder", "decoder", "posterior", "prior", "likelihood")


class Inferred(NamedTuple):
    """What `VAE.infer` finds for a batch."""

    x: Tensor
    """The observed values, `[B, C, H, W]` float32."""
    condition: Tensor | None
    """The classes, `[B, num_classes]`."""
    start: Tensor
    """The encoder's statistics, `[B, …]`."""
    statistics: Tensor
    """The same after refinement; `start` itself without."""
    first_gradient: Tensor | None
    """The gradient of each row's loss at `start`; None without refinement."""


@final
class VAE(
    nn.Module,
    ModelHubMixin,
    library_name="fastvae",
    tags=["vae", "variational-autoencoder"],
):
    """A variational autoencoder (Kingma & Welling 2014) made of five parts.

    Args:
        encoder: images `[B, C, H, W]` float32 in [0, 1] → statistics
            `[B, posterior.statistics_per_latent · latent_dim]`.
        decoder: z `[B, latent_dim]` → parameters `[B, P, H, W]`, with
            P = `likelihood.parameter_channels(C)`.
        likelihood: p(x | z), for instance `fastvae.Bernoulli()` or `fastvae.Gaussian()`.
        image_shape: (C, H, W).
        latent_dim: the number of latents.
        posterior: q(z | x); a diagonal Gaussian unless given.
        prior: p(z); standard normal unless given.
        num_classes: 0, or K for a conditional model: q(z | x, y) and p(x | z, y). Encoder and
            decoder then take y, float32 `[B, K]` with a 1 at each row's class, as second argument.
        refinement: improve the encoder's answer for each image by so many steps of optimisation
            (semi-amortised inference, Kim et al. 2018); how unseen images get theirs where the
            encoder is a table.
        impl: which kernels: "auto", "triton" or "torch".

    Images are passed as they are stored: uint8, or floating in [0, 1].
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        *,
        image_shape: ImageShape,
        latent_dim: int,
        posterior: Posterior | None = None,
        prior: Prior | None = None,
        num_classes: int = 0,
        refinement: Refinement | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise UserError(f"image_shape is (channels, height, width), got {tuple(image_shape)}")
        if latent_dim < 1:
            raise UserError(f"latent_dim is at least 1, got {latent_dim}")
        self.image_shape: ImageShape = tuple(image_shape)  # type: ignore[assignment]
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        self.refinement = refinement
        self.impl: Impl = impl
        self.encoder = encoder
        self.posterior = DiagonalGaussian() if posterior is None else posterior
        self.prior = StandardNormal(latent_dim) if prior is None else prior
        self.decoder = decoder
        self.likelihood = likelihood
        if getattr(self.prior, "needs_condition", False) and not num_classes:
            raise UserError(
                f"{type(self.prior).__name__} is a prior for each class: give the model num_classes"
            )
        for part in (self.prior, decoder):
            if (own := getattr(part, "latent_dim", latent_dim)) != latent_dim:
                raise UserError(
                    f"the model has {latent_dim} latents and its {type(part).__name__} {own}"
                )
        if self.reads_index and refinement is None:
            raise UserError("a table has no answer for unseen images: give the model a refinement")

    @property
    def is_bound(self) -> bool:
        """Whether −(nll + kl) bounds log p(x) from below."""
        return self.likelihood.is_density and self.posterior.is_distribution

    @property
    def reads_index(self) -> bool:
        """Whether the encoder is a table, that knows images by their place in the training set."""
        return getattr(self.encoder, "reads_index", False)

    # ------------------------------------------------------------------ the terms of the bound

    def forward(
        self,
        x: Tensor | Batch,
        seed: int | Tensor,
        offset: int | Tensor = 0,
        num_samples: int = 1,
    ) -> Terms:
        """−log p(x | z) and KL(q ‖ p) of each image, for `num_samples` draws of z.

        Args:
            x: `[B, C, H, W]` uint8, or floating in [0, 1]; or a `Batch`, which a conditional model
                needs for its labels.
            seed: the run's seed, an int or an int64 tensor on `x`'s device: one element, or
                what `fastvae.noise.all_streams` made of it.
            offset: the global position of the first image, likewise. All draws (of z, and of
                zeros and ones where the likelihood binarises) are functions of both.
            num_samples: S.

        Returns:
            `Terms`, float32 in nats: `nll` `[S, B]`, `kl` `[B]`, and what they were made from.
        """
        batch = x if isinstance(x, Batch) else Batch(x)
        found = self.infer(batch, seed, offset)
        terms = self.terms(found.statistics, found.x, found.condition, seed, offset, num_samples)
        if found.first_gradient is None:
            return terms
        # The decoder learns from the refined answer, the encoder from its own: 0 in value, the
        # gradient of the loss where the search began (Krishnan et al. 2018, section 3).
        learns = (found.start * found.first_gradient.detach()).sum(1)
        return terms._replace(nll=terms.nll + (learns - learns.detach()))

    def infer(self, batch: Batch, seed: int | Tensor, offset: int | Tensor = 0) -> "Inferred":
        """The statistics of q for a batch, and the values and classes they were found for."""
        observe_seed = streams.stream(seed, streams.OBSERVE)
        x = self.likelihood.observe(batch.images, observe_seed, offset, batch.chosen)
        condition = self.condition(batch.labels)
        start = self._statistics(x, condition, batch.indices)
        if self.refinement is None or (self.reads_index and batch.indices is not None):
            return Inferred(x, condition, start, start, None)
        statistics, first_gradient = self.refine(start, x, condition, seed, offset)
        return Inferred(x, condition, start, statistics, first_gradient)

    def terms(
        self,
        statistics: Tensor,
        x: Tensor,
        condition: Tensor | None,
        seed: int | Tensor,
        offset: int | Tensor = 0,
        num_samples: int = 1,
    ) -> Terms:
        """The terms for given statistics of q `[B, …]` and observed values x `[B, C, H, W]`."""
        p = self.prior_of(condition)
        z, kl, q = self.posterior.draw(
            statistics, p, num_samples, streams.stream(seed, streams.LATENT), offset, self.impl
        )
        parameters = self.parameters_of(z.flatten(0, 1), _repeated(condition, len(z)))
        repeated = _repeated(x, len(z))
        assert repeated is not None
        nll = self.likelihood.nll(parameters, repeated, self.impl)
        return Terms(nll.view(len(z), -1), kl, z, q, p)

    def refine(
        self,
        statistics: Tensor,
        x: Tensor,
        condition: Tensor | None,
        seed: int | Tensor,
        offset: int | Tensor = 0,
        plan: Refinement | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Better statistics for each image by optimising its ELBO from `statistics` on: see
        `fastvae.refinement.refine`. `plan` is the model's own unless given."""
        plan = plan or self.refinement
        assert plan is not None

        def loss(statistics: Tensor, seed: int | Tensor) -> Tensor:
            return -self.terms(statistics, x, condition, seed, offset).elbo

        return refine(loss, statistics, plan, seed)

    def elbo(
        self, x: Tensor | Batch, *, seed: int | Tensor = 0, offset: int | Tensor = 0
    ) -> Tensor:
        """The evidence lower bound of each image, `[B]` float32 nats, from one draw of z.

        Of grey images under a `Bernoulli` likelihood that binarises dynamically, it is the bound
        of one binary draw of each; under one that does not binarise, or a deterministic posterior,
        it bounds no likelihood.
        """
        return self(x, seed, offset).elbo

    # --------------------------------------------------------------------- using a trained model

    def encode(
        self, x: Tensor, labels: Tensor | None = None, indices: Tensor | None = None
    ) -> LatentGaussian:
        """The mean and log-variance of q(z | x), each `[B, latent_dim]`, for images as they are.

        Nothing is drawn: grey pixels reach the encoder as grey, also where training binarised.
        `labels` int64 `[B]` for conditional models; `indices` for images of a table's training set.
        """
        x, condition = pixels(x), self.condition(labels, checked=True)
        statistics = self._statistics(x, condition, indices)
        if self.refinement is not None and not (self.reads_index and indices is not None):
            statistics, _ = self.refine(statistics, x, condition, seed=0)
        return self.posterior.moments(statistics)

    def decode(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """E[x | z]: `[B, latent_dim]` → float32 `[B, C, H, W]`."""
        return self.likelihood.mean(self.parameters_of(z, self.condition(labels, checked=True)))

    def reconstruct(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """E[x | z] at the posterior mean of z: `[B, C, H, W]` → float32 of the same shape."""
        return self.decode(self.encode(x, labels).mu, labels)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        labels: Tensor | None = None,
        noise: bool = False,
    ) -> Tensor:
        """Draw n images: z ~ p(z), then E[x | z], or x ~ p(x | z) with `noise=True`.

        Image i is a function of (seed, i). Without a seed, one is drawn from `generator` or from
        torch's global generator. A conditional model takes `labels` int64 `[n]`, and goes through
        its classes in turn without. Returns float32 `[n, C, H, W]`.
        """
        if n < 1:
            raise UserError(f"sample(n) draws at least one image, got {n}")
        if seed is None:
            where = generator.device if generator else torch.device("cpu")
            seed = int(torch.randint(2**62, (), generator=generator, device=where).item())
        device = next(self.parameters()).device
        if self.num_classes and labels is None:
            labels = torch.arange(n) % self.num_classes
        if labels is not None and len(labels) != n:
            raise UserError(f"sample({n}) takes {n} labels, got {len(labels)}")
        labels = None if labels is None else labels.to(device)
        condition = self.condition(labels, checked=True)
        z = self.prior_of(condition).sample(n, streams.stream(seed, streams.PRIOR), device)
        return self.sample_given(z, seed=seed, labels=labels, noise=noise)

    @torch.no_grad()
    def sample_given(
        self, z: Tensor, *, seed: int, labels: Tensor | None = None, noise: bool = False
    ) -> Tensor:
        """E[x | z] for z `[n, latent_dim]`, or x ~ p(x | z) with `noise=True`: `[n, C, H, W]`."""
        parameters = self.parameters_of(z, self.condition(labels, checked=True))
        if noise:
            return self.likelihood.sample(parameters, streams.stream(seed, streams.LIKELIHOOD))
        return self.likelihood.mean(parameters)

    # -------------------------------------------------------------- between the parts, checked

    def condition(self, labels: Tensor | None, *, checked: bool = False) -> Tensor | None:
        """y as float32 `[B, num_classes]`, a 1 at each row's class; None if unconditional.

        Raises UserError where a conditional model is given no labels, or, if `checked` (which makes
        the host wait for a GPU), labels that are no classes of it.
        """
        if not self.num_classes:
            return None
        if labels is None:
            raise UserError(
                f"this model is conditional on {self.num_classes} classes: it needs the labels"
            )
        if labels.is_floating_point():
            raise UserError(
                f"this model is conditional on {self.num_classes} classes, and these labels are "
                "real numbers"
            )
        if checked and not (labels.min() >= 0 and labels.max() < self.num_classes):
            raise UserError(
                f"labels lie in 0..{self.num_classes - 1} for this model, "
                f"got {int(labels.min())}..{int(labels.max())}"
            )
        classes = torch.arange(self.num_classes, device=labels.device)
        return (labels.unsqueeze(1) == classes).float()

    def check_labels(self, labels: Tensor | None) -> None:
        """Raise UserError unless the model can be trained or evaluated on data with these."""
        self.condition(labels, checked=True)

    def prior_of(self, condition: Tensor | None) -> Any:
        """p(z), or p(z | y) for the rows of `condition`: a `LatentPrior`."""

        def encode(images: Tensor) -> LatentGaussian:
            return self.posterior.moments(self._statistics(images, None, None))

        return self.prior.distribution(condition, encode)

    def parameters_of(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """The likelihood's parameters: `[B, latent_dim]` → `[B, P, H, W]`."""
        if tuple(z.shape[1:]) != (self.latent_dim,):
            raise UserError(f"z has shape (N, {self.latent_dim}) here, got {tuple(z.shape)}")
        channels, height, width = self.image_shape
        parameters = self.decoder(z) if condition is None else self.decoder(z, condition)
        expected = (z.shape[0], self.likelihood.parameter_channels(channels), height, width)
        if tuple(parameters.shape) != expected:
            raise UserError(
                f"the decoder returned {tuple(parameters.shape)}; "
                f"{type(self.likelihood).__name__} with image_shape={self.image_shape} "
                f"needs {expected}"
            )
        return parameters

    def _statistics(self, x: Tensor, condition: Tensor | None, indices: Tensor | None) -> Tensor:
        """The encoder's answer `[B, statistics_per_latent · latent_dim]`."""
        if tuple(x.shape[1:]) != self.image_shape:
            raise UserError(
                f"this model takes images {('N', *self.image_shape)} (N, channels, height, width), "
                f"got {tuple(x.shape)}"
            )
        expected = (x.shape[0], self.posterior.statistics_per_latent * self.latent_dim)
        if self.reads_index:
            # An unseen image starts where those of the table did.
            statistics = x.new_zeros(expected) if indices is None else self.encoder(indices)
        else:
            statistics = self.encoder(x) if condition is None else self.encoder(x, condition)
        if tuple(statistics.shape) != expected:
            raise UserError(
                f"the encoder returned {tuple(statistics.shape)}; {type(self.posterior).__name__} "
                f"with latent_dim={self.latent_dim} needs {expected}"
            )
        return statistics

    # ------------------------------------------------------------------------- saving, loading

    def spec(self) -> dict[str, Any]:
        """What config.json holds: shapes, and each part's name and arguments."""
        parts = {kind: spec_of(getattr(self, kind)) for kind in PART_KINDS}
        return {
            "model": "vae",
            "image_shape": list(self.image_shape),
            "latent_dim": self.latent_dim,
            "num_classes": self.num_classes,
            "refinement": None if self.refinement is None else self.refinement._asdict(),
            **parts,
        }

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write config.json and model.safetensors into an existing folder."""
        saving.save_model(self, save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "VAE":
        """Load a model from a run's folder, a folder that was saved, or a name on the Hub.

        `options` are those of `_from_pretrained` and huggingface_hub's own (`revision`, `token`,
        …). Raises UserError where there is no model, a damaged one, or one of other parts.
        """
        name = str(pretrained_model_name_or_path)
        with saving.reading(name):
            return super().from_pretrained(name, **options)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: str = "cpu", **options: Any) -> "VAE":
        """Called by `from_pretrained(folder_or_hub_name, **options)`.

        Modules among the options replace parts by keyword: needed for the user's own, of which the
        file holds the weights but not the code. `map_location` is the device to load on.
        """

        def build(spec: dict[str, Any]) -> VAE:
            return build_vae(spec, **parts_only(options))

        return saving.load_model(model_id, "vae", build, map_location, options)


def parts_only(arguments: dict[str, Any]) -> dict[str, nn.Module]:
    """The arguments that are modules: huggingface_hub passes config.json's entries along."""
    return {k: v for k, v in arguments.items() if isinstance(v, nn.Module)}


def build_vae(spec: dict[str, Any], **parts: nn.Module) -> VAE:
    """Make the model that `VAE.spec()` describes, with `parts` in place of those it names.

    Raises UserError where the spec is incomplete, names an unknown part, or names a custom part
    that `parts` does not give.
    """
    missing = [key for key in ("image_shape", "latent_dim", *PART_KINDS) if key not in spec]
    if missing:
        raise UserError(f"the model's {CONFIG_NAME} lacks {', '.join(missing)}")
    for kind in PART_KINDS:
        if kind in parts:
            continue
        if spec[kind]["name"] == CUSTOM:
            raise UserError(
                f"this model's {kind} is a module of its own ({spec[kind].get('class')}): make it "
                f"and pass it, VAE.from_pretrained(..., {kind}=your_module)"
            )
        parts[kind] = build_part(kind, spec[kind])
    refinement = spec.get("refinement")
    return VAE(
        image_shape=tuple(spec["image_shape"]),  # type: ignore[arg-type]
        latent_dim=spec["latent_dim"],
        num_classes=spec.get("num_classes", 0),
        refinement=None if refinement is None else Refinement(**refinement),
        **parts,  # type: ignore[arg-type]
    )


def _repeated(x: Tensor | None, times: int) -> Tensor | None:
    """`[B, …]` → `[times · B, …]`, the whole batch again and again; no copy where times is 1."""
    return None if x is None else x.expand(times, *x.shape).flatten(0, 1)
