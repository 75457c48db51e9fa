"""The model: one final class composed of parts."""

import json
import re
from pathlib import Path
from typing import Any, final

import torch
from fastvae_kernels import Impl
from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# Imported for their registration as well.
from fastvae import noise
from fastvae.errors import UserError
from fastvae.parts import DiagonalGaussian, StandardNormal, Terms
from fastvae.parts.likelihoods import Likelihood
from fastvae.parts.networks import ImageShape, pixels
from fastvae.parts.posteriors import LatentGaussian, Posterior
from fastvae.parts.priors import Prior
from fastvae.parts.spec import CUSTOM, build_part, spec_of

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
PART_KINDS = ("encoder", "decoder", "posterior", "prior", "likelihood")


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
        decoder: z `[B, latent_dim]` → parameters `[B, likelihood.outputs_per_value · C, H, W]`.
        likelihood: p(x | z), for instance `fastvae.Bernoulli()` or `fastvae.Gaussian()`.
        image_shape: (C, H, W).
        latent_dim: the number of latents.
        posterior: q(z | x); a diagonal Gaussian unless given.
        prior: p(z); standard normal unless given.
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
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise UserError(f"image_shape is (channels, height, width), got {tuple(image_shape)}")
        if latent_dim < 1:
            raise UserError(f"latent_dim is at least 1, got {latent_dim}")
        self.image_shape: ImageShape = tuple(image_shape)  # type: ignore[assignment]
        self.latent_dim = latent_dim
        self.impl: Impl = impl
        self.encoder = encoder
        self.posterior = DiagonalGaussian() if posterior is None else posterior
        self.prior = StandardNormal(latent_dim) if prior is None else prior
        self.decoder = decoder
        self.likelihood = likelihood

    # ------------------------------------------------------------------ the terms of the bound

    def forward(self, x: Tensor, seed: int | Tensor, offset: int | Tensor = 0) -> Terms:
        """−log p(x | z) and KL(q ‖ p) of each image, for one draw of z.

        Args:
            x: `[B, C, H, W]` uint8, or floating in [0, 1].
            seed: the run's seed, an int or an int64 tensor of one element on `x`'s device.
            offset: the global position of the first image, likewise. All draws (of z, and of
                zeros and ones where the likelihood binarises) are functions of both.

        Returns:
            `Terms(nll, kl)`, each `[B]` float32 in nats.
        """
        x = self.likelihood.observe(x, noise.stream(seed, noise.OBSERVE), offset)
        statistics = self._encoded(x)
        z, kl = self.posterior.sample_kl(
            statistics, self.prior, noise.stream(seed, noise.LATENT), offset, self.impl
        )
        return Terms(self.likelihood.nll(self._decoded(z), x, self.impl), kl)

    def elbo(self, x: Tensor, *, seed: int | Tensor = 0, offset: int | Tensor = 0) -> Tensor:
        """The evidence lower bound of each image, `[B]` float32 nats, from one draw of z.

        Of grey images under a `Bernoulli` likelihood that binarises dynamically, it is the bound
        of one binary draw of each; under one that does not binarise, it bounds no likelihood.
        """
        return self(x, seed, offset).elbo

    # --------------------------------------------------------------------- using a trained model

    def encode(self, x: Tensor) -> LatentGaussian:
        """q(z | x) for images as they are: `mu` and `logvar`, each `[B, latent_dim]`.

        Nothing is drawn: grey pixels reach the encoder as grey, also where training binarised.
        """
        return self.posterior.distribution(self._encoded(pixels(x)))

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z]: `[B, latent_dim]` → float32 `[B, C, H, W]`."""
        return self.likelihood.mean(self._decoded(z))

    def reconstruct(self, x: Tensor) -> Tensor:
        """E[x | z] at the posterior mean of z: `[B, C, H, W]` → float32 of the same shape."""
        return self.decode(self.encode(x).mu)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        noise_in_x: bool = False,
    ) -> Tensor:
        """Draw n images: z ~ p(z), then E[x | z], or x ~ p(x | z) with `noise_in_x=True`.

        Image i is a function of (seed, i). Without a seed, one is drawn from `generator` or from
        torch's global generator. Returns float32 `[n, C, H, W]`.
        """
        if n < 1:
            raise UserError(f"sample(n) draws at least one image, got {n}")
        if seed is None:
            where = generator.device if generator else torch.device("cpu")
            seed = int(torch.randint(2**62, (), generator=generator, device=where).item())
        device = next(self.parameters()).device
        z = self.prior.sample(n, noise.stream(seed, noise.PRIOR), device)
        parameters = self._decoded(z)
        if noise_in_x:
            return self.likelihood.sample(parameters, noise.stream(seed, noise.LIKELIHOOD))
        return self.likelihood.mean(parameters)

    # ------------------------------------------------------------------------ shapes, checked

    def _encoded(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.image_shape:
            raise UserError(
                f"this model takes images {('N', *self.image_shape)} (N, channels, height, width), "
                f"got {tuple(x.shape)}"
            )
        statistics = self.encoder(x)
        expected = (x.shape[0], self.posterior.statistics_per_latent * self.latent_dim)
        if tuple(statistics.shape) != expected:
            raise UserError(
                f"the encoder returned {tuple(statistics.shape)}; {type(self.posterior).__name__} "
                f"with latent_dim={self.latent_dim} needs {expected}"
            )
        return statistics

    def _decoded(self, z: Tensor) -> Tensor:
        if tuple(z.shape[1:]) != (self.latent_dim,):
            raise UserError(f"z has shape (N, {self.latent_dim}) here, got {tuple(z.shape)}")
        channels, height, width = self.image_shape
        parameters = self.decoder(z)
        expected = (z.shape[0], self.likelihood.outputs_per_value * channels, height, width)
        if tuple(parameters.shape) != expected:
            raise UserError(
                f"the decoder returned {tuple(parameters.shape)}; "
                f"{type(self.likelihood).__name__} with image_shape={self.image_shape} "
                f"needs {expected}"
            )
        return parameters

    # ------------------------------------------------------------------------- saving, loading

    def spec(self) -> dict[str, Any]:
        """What config.json holds: shapes, and each part's name and arguments."""
        parts = {kind: spec_of(getattr(self, kind)) for kind in PART_KINDS}
        return {"image_shape": list(self.image_shape), "latent_dim": self.latent_dim, **parts}

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write config.json and model.safetensors into an existing folder."""
        (save_directory / CONFIG_NAME).write_text(json.dumps(self.spec(), indent=2) + "\n")
        state = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, save_directory / WEIGHTS_NAME, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "VAE":
        """Load a model from a run's folder, a folder that was saved, or a name on the Hub.

        `options` are those of `_from_pretrained` and huggingface_hub's own (`revision`, `token`,
        …). Raises UserError where there is no model, a damaged one, or one of other parts.
        """
        name = str(pretrained_model_name_or_path)
        # A mistyped path deserves its answer at once, not after a wait for the Hub.
        on_hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII)
        if not Path(name).is_dir() and not (on_hub and not Path(name).parent.is_dir()):
            raise UserError(
                f"there is no folder {name} (a name on the Hugging Face Hub has the form "
                "owner/name, and the owner is no folder here)"
            )
        try:
            return super().from_pretrained(name, **options)
        except json.JSONDecodeError as error:
            raise UserError(f"the {CONFIG_NAME} of {name} is damaged: {error}") from error
        except OSError as error:  # what huggingface_hub raises is one, too
            where = "" if Path(name).is_dir() else "there is no such folder, and from the Hub "
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{name}: {where}no model could be read: {reason}") from error

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = "cpu",
        **parts: Any,
    ) -> "VAE":
        """Called by `from_pretrained(folder_or_hub_name, **parts)`.

        `parts` replaces parts by keyword: needed for the user's own modules, of which the file
        holds the weights but not the code. `map_location` is the device to load on.
        """

        def fetch(name: str) -> Path:
            if (folder := Path(model_id)).is_dir():
                # A run folder holds its model in checkpoint/.
                for candidate in (folder / "checkpoint" / name, folder / name):
                    if candidate.is_file() and (candidate.parent / WEIGHTS_NAME).is_file():
                        return candidate
                raise UserError(
                    f"{folder} holds no model: neither {WEIGHTS_NAME} with {CONFIG_NAME} nor "
                    "checkpoint/ with both"
                )
            return Path(
                hf_hub_download(
                    model_id,
                    name,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )

        vae = build_vae(json.loads(fetch(CONFIG_NAME).read_text()), **parts_only(parts))
        weights = fetch(WEIGHTS_NAME)
        try:
            vae.load_state_dict(load_file(weights))
        except SafetensorError as error:
            raise UserError(f"{weights} is damaged: {error}") from error
        except RuntimeError as error:
            raise UserError(f"{weights} holds the weights of another model: {error}") from error
        return vae.to(map_location).eval()


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
    return VAE(image_shape=tuple(spec["image_shape"]), latent_dim=spec["latent_dim"], **parts)  # type: ignore[arg-type]
