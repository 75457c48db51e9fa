"""The training step without fastvae: plain PyTorch, the usual script, pythae.

All train the network that a `ModelConfig` describes, from the weights that they are given. Each
maker returns a step, which moves the weights and returns the loss of its batch (0-d, on the
device, nats per image), or with pythae a whole epoch of them.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastvae.config import Config, ModelConfig

Step = Callable[[], Tensor]

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


class PlainVAE(nn.Module):
    """As it is written by hand, with one matrix product for mu and logvar together."""

    def __init__(self, config: ModelConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        networks = {"mlp": _mlp, "conv": _conv}[config.network]
        self.encoder, self.decoder = networks(config, image_shape)
        self.gaussian = config.likelihood == "gaussian"
        self.binarizes = config.binarization == "dynamic"
        if self.gaussian:  # of the pixels; in a list, so that it is the last of the parameters
            self.likelihood = nn.ParameterList([nn.Parameter(torch.tensor(math.log(0.1)))])

    def observed(self, rows: Tensor) -> Tensor:
        """Bytes → what the decoder is to explain, in [0, 1]."""
        x = rows.float() / 255
        return (torch.rand_like(x) < x).float() if self.binarizes else x

    def importance_weighted(self, x: Tensor, noise: Tensor) -> Tensor:
        """`[B, C, H, W]` in {0, 1}, `[S, B, D]` → nats per image (0-d): −log of the mean over S
        draws of p(x, z) / q(z given x), Burda et al. 2016, equation 8. Bernoulli pixels."""
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z = mu + torch.exp(0.5 * logvar) * noise
        decoded = self.decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        crosses = F.binary_cross_entropy_with_logits(
            decoded, x.expand_as(decoded), reduction="none"
        )
        # log p(z) − log q(z given x): what both have of log 2π cancels.
        ratios = 0.5 * (noise**2 + logvar - z**2).sum(2)
        return (math.log(len(z)) - torch.logsumexp(ratios - crosses.flatten(2).sum(2), 0)).mean()

    def loss(self, x: Tensor, noise: Tensor) -> Tensor:
        """`[B, C, H, W]` in [0, 1], `[B, D]` → nats per image (0-d)."""
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        decoded = self.decoder(mu + torch.exp(0.5 * logvar) * noise)
        if self.gaussian:
            (log_variance,) = self.likelihood
            squares = torch.sum((x - decoded) ** 2) * torch.exp(-log_variance)
            nll = 0.5 * (squares + x.numel() * (log_variance + math.log(2 * math.pi)))
        else:
            nll = F.binary_cross_entropy_with_logits(decoded, x, reduction="sum")
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return (nll + kl) / len(x)


def objective_of(vae: PlainVAE, config: Config) -> tuple[Callable[[Tensor, Tensor], Tensor], Any]:
    """What is minimised, as a function of the pixels and of noise, and the size of that noise for
    one batch."""
    latents = config.batch_size, config.model.latent_dim
    if config.objective.objective == "importance-weighted":
        assert not vae.gaussian
        return vae.importance_weighted, (config.objective.num_samples, *latents)
    assert config.objective.num_samples == 1
    return vae.loss, latents


def _mlp(config: ModelConfig, image_shape: tuple[int, int, int]) -> tuple[nn.Module, nn.Module]:
    pixels = math.prod(image_shape)
    encoder = nn.Sequential(
        nn.Flatten(),
        *_layers((pixels, *config.hidden), config),
        nn.Linear(config.hidden[-1], 2 * config.latent_dim),
    )
    decoder = nn.Sequential(
        *_layers((config.latent_dim, *config.hidden[::-1]), config),
        nn.Linear(config.hidden[0], pixels),
        nn.Unflatten(1, image_shape),
    )
    return encoder, decoder


def _conv(config: ModelConfig, image_shape: tuple[int, int, int]) -> tuple[nn.Module, nn.Module]:
    """Convolutions that halve the image, and transposed ones that double it; even sizes only."""
    channels, height, width = image_shape
    halved = 2 ** len(config.widths)
    assert height % halved == width % halved == 0
    activation = ACTIVATIONS[config.activation]
    small = (config.widths[-1], height // halved, width // halved)
    encoder: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((channels, *config.widths)):
        encoder += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), activation()]
    encoder += [nn.Flatten(), *_layers((math.prod(small), *config.hidden), config)]
    encoder.append(nn.Linear(config.hidden[-1], 2 * config.latent_dim))
    sizes = (config.latent_dim, *config.hidden[::-1], math.prod(small))
    decoder: list[nn.Module] = [*_layers(sizes, config), nn.Unflatten(1, small)]
    widths = (*config.widths[::-1], config.widths[0])
    for inputs, outputs in itertools.pairwise(widths):
        up = nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1)
        decoder += [up, activation()]
    decoder.append(nn.Conv2d(widths[-1], channels, 3, padding=1))
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


def _layers(sizes: tuple[int, ...], config: ModelConfig) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), ACTIVATIONS[config.activation]()]
    return layers


def plain_like(model: nn.Module, config: ModelConfig, shape: tuple[int, int, int]) -> PlainVAE:
    """The plain network with the weights of `model`, where it lies: parameter by parameter."""
    plain = PlainVAE(config, shape)
    with torch.no_grad():
        for ours, theirs in zip(plain.parameters(), model.parameters(), strict=True):
            assert ours.shape == theirs.shape, f"{ours.shape} and {theirs.shape}"
            ours.copy_(theirs)
    return plain.to(next(model.parameters()).device)


# ------------------------------------------------------------------- images on the device


class OnDevice(nn.Module):
    """The loss of some rows of a set of bytes `[N, C, H, W]` that lies beside the weights.

    A buffer, so that a compiled function with a CUDA graph reads it where it is.
    """

    def __init__(self, vae: PlainVAE, images: Tensor, config: Config) -> None:
        super().__init__()
        self.vae = vae
        self.images: Tensor
        self.register_buffer("images", images)
        self.bf16 = config.mixed_precision == "bf16"
        self.loss, self.noise = objective_of(vae, config)

    def forward(self, indices: Tensor) -> Tensor:
        """int64 `[B]` → nats per image (0-d)."""
        x = self.vae.observed(self.images.index_select(0, indices))
        noise = torch.randn(self.noise, device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.loss(x, noise)


def plain_step(vae: PlainVAE, images: Tensor, config: Config, *, compiled: bool) -> Step:
    """Images as bytes on the device, no `.item()`.

    Eager with Adam as it comes; or compiled with every advantage: on a GPU one function from the
    rows' places to the loss by `reduce-overhead`, which replays CUDA graphs, and Adam fused and
    capturable. On a CPU, where Inductor's random numbers are slow, they are drawn outside, and the
    default mode compiles.
    """
    module = OnDevice(vae, images, config)
    on_gpu = images.is_cuda
    options: dict[str, Any] = {"fused": True, "capturable": on_gpu} if compiled else {}
    rate = config.optimizer.learning_rate
    optimizer = torch.optim.Adam(vae.parameters(), lr=rate, **options)
    if compiled and on_gpu:
        module.compile(fullgraph=True, dynamic=False, mode="reduce-overhead")
    elif compiled:
        module.loss = torch.compile(module.loss, fullgraph=True, dynamic=False)
    batch, position, order = config.batch_size, 0, torch.randperm(len(images), device=images.device)

    def step() -> Tensor:
        nonlocal position, order
        if position + batch > len(images):
            position, order = 0, torch.randperm(len(images), device=images.device)
        loss = module(order[position : position + batch])
        position += batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


# ----------------------------------------------------------------------- the usual script


class PILImages(Dataset):
    """Bytes `[N, C, H, W]`, each made a PIL image and then, by ToTensor, a float32 tensor: what
    torchvision's MNIST and CIFAR-10 do when an image is asked for."""

    def __init__(self, images: Tensor) -> None:
        from PIL import Image
        from torchvision.transforms import ToTensor

        rows = images.cpu().permute(0, 2, 3, 1)
        self.rows = (rows[..., 0] if rows.shape[-1] == 1 else rows).numpy()
        self.picture, self.transform = Image.fromarray, ToTensor()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.picture(self.rows[index]))


def script_step(vae: PlainVAE, images: Tensor, config: Config) -> Step:
    """As tutorials have it: eager, ToTensor in a DataLoader, the loss read at every step."""
    device = images.device
    loader = DataLoader(
        PILImages(images),
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,
        pin_memory=device.type == "cuda",
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    optimizer = torch.optim.Adam(vae.parameters(), lr=config.optimizer.learning_rate)
    bf16 = config.mixed_precision == "bf16"
    loss_of, size = objective_of(vae, config)
    total = 0.0

    def step() -> Tensor:
        nonlocal total
        x = next(batches).to(device)
        noise = torch.randn(size, device=device)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of(x, noise)
        loss.backward()
        total += loss.item()
        optimizer.step()
        return loss.detach()

    return step


# --------------------------------------------------------------------------------- pythae


def pythae_epoch(vae: PlainVAE, images: Tensor, config: Config, folder: str) -> Callable[[], float]:
    """`BaseTrainer.train_step` unchanged: an epoch through `images` and its mean loss.

    Bernoulli likelihoods and float32 alone. The trainer writes into `folder`.
    """
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = vae.encoder

        def forward(self, x: Tensor) -> Any:
            mu, logvar = self.network(x).chunk(2, dim=1)
            return ModelOutput(embedding=mu, log_covariance=logvar)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(vae.decoder, nn.Sigmoid())

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.network(z))

    model_config = VAEConfig(
        input_dim=tuple(images.shape[1:]),
        latent_dim=config.model.latent_dim,
        reconstruction_loss="bce",
    )
    trainer = BaseTrainer(
        model=VAE(model_config, encoder=Encoder(), decoder=Decoder()),
        train_dataset=BaseDataset(images.cpu().float() / 255, torch.zeros(len(images))),
        training_config=BaseTrainerConfig(
            output_dir=folder,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.optimizer.learning_rate,
            no_cuda=not images.is_cuda,
        ),
    )
    trainer.prepare_training()
    epochs = itertools.count(1)
    return lambda: trainer.train_step(next(epochs))
