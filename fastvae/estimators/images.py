"""How near reconstructions are to their originals, and samples to data."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastvae.errors import UserError
from fastvae.files import sha256

_WINDOW = 11  # of SSIM, in pixels, with σ = 1.5 (Wang et al. 2004)
_MIN_MSE = 1e-10  # 100 dB: an image that comes back exactly would have a PSNR of infinity


class ReconstructionScores(NamedTuple):
    """Means over images; pixels in [0, 1].

    Attributes:
        images: how many.
        mse: mean squared error of a pixel.
        psnr: decibels, the mean over images of each image's −10 log10(mse), as papers on image
            reconstruction report it. It is not −10 log10 of `mse`, which is smaller, and stops at
            100 dB for an image that comes back exactly.
        ssim: structural similarity, mean over positions, channels and images; nan if the image is
            too small.
        ssim_window: the side of its window in pixels: 11, or the largest odd number that fits in
            a smaller image, which is not comparable. 0 below 3 pixels.
    """

    images: int
    mse: float
    psnr: float
    ssim: float
    ssim_window: int


class ReconstructionMetrics:
    """MSE, PSNR and SSIM over a stream of batches; every image counts once.

    `totals` (float64 `[4]`: images, and the sums over images of MSE, PSNR and SSIM) is all that
    is kept, so ranks are joined by adding it: `metrics.totals = all_reduce(metrics.totals)`.

    Args:
        image_shape: (C, H, W) of all images.
        device: where `totals` lie.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], device: torch.device | str = "cpu"
    ) -> None:
        self.image_shape = tuple(image_shape)
        self.totals = torch.zeros(4, dtype=torch.float64, device=device)
        side = min(_WINDOW, *self.image_shape[1:])
        self.ssim_window = side - (side + 1) % 2 if side >= 3 else 0

    @torch.no_grad()
    def update(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Add a batch: two `[B, C, H, W]`, uint8 or floating on the scale of [0, 1].

        A reconstruction outside [0, 1] is brought to the nearer end, as it would be when shown.

        Raises:
            UserError: for other shapes.
        """
        for name, images in (("originals", originals), ("reconstructions", reconstructions)):
            if tuple(images.shape[1:]) != self.image_shape or len(images) != len(originals):
                raise UserError(
                    f"{name} must be [B, {', '.join(map(str, self.image_shape))}] and as many as "
                    f"the others, got {tuple(images.shape)}"
                )
        if len(originals) == 0:
            return
        x, y = _unit_scale(originals), _unit_scale(reconstructions)
        mse = (x - y).double().square().mean((1, 2, 3))
        psnr = -10 * mse.clamp(min=_MIN_MSE).log10()
        ssim = self._ssim(x, y)
        self.totals += (
            torch.stack([torch.ones_like(mse), mse, psnr, ssim.double()])
            .sum(1)
            .to(self.totals.device)
        )

    def compute(self) -> ReconstructionScores:
        """The means so far.

        Raises:
            UserError: before any image.
        """
        images = int(self.totals[0].item())
        if images == 0:
            raise UserError("no reconstruction was compared: the data hold no images")
        mse, psnr, ssim = (self.totals[1:] / images).tolist()
        return ReconstructionScores(images, mse, psnr, ssim, self.ssim_window)

    def _ssim(self, x: Tensor, y: Tensor) -> Tensor:
        if self.ssim_window == 0:
            return torch.full((len(x),), torch.nan, device=x.device)
        from torchmetrics.functional.image import structural_similarity_index_measure

        # torchmetrics takes the window from σ; a smaller one keeps the shape, 1.5 : 5.
        radius = self.ssim_window // 2
        _, full = structural_similarity_index_measure(
            y, x, sigma=0.3 * radius, data_range=1.0, reduction="none", return_full_image=True
        )
        # Only windows inside the image, as Wang et al. 2004 and scikit-image; whether torchmetrics
        # leaves the padded border out of its own mean depends on its release.
        return full[..., radius:-radius, radius:-radius].mean((1, 2, 3))


class FrechetDistance(NamedTuple):
    """A distance means nothing without the features it was taken in and the number of images."""

    distance: float
    features: str
    images: tuple[int, int]


def frechet_distance(features_a: Tensor, features_b: Tensor, *, name: str) -> FrechetDistance:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) of the Gaussians fitted to two sets of features.

    Dowson & Landau 1982; with Inception features it is the FID of Heusel et al. 2017
    (arXiv:1706.08500). float64, unbiased covariances. The distance is biased upwards for few
    images, so that only equal numbers of images compare.

    Args:
        features_a, features_b: `[N, F]` and `[M, F]`, at least two rows each.
        name: what the features are.

    Raises:
        UserError: for other shapes.
    """
    a, b = features_a.double(), features_b.double()
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise UserError(
            "the Fréchet distance needs features [N, F] and [M, F] of at least two images, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    covariance_a, covariance_b = _covariance(a), _covariance(b)
    # The trace of (Σ_a Σ_b)^½ is the sum of the singular values of Σ_a^½ Σ_b^½: no root is taken
    # of a product that is not symmetric, and rank-deficient covariances lose no digits.
    root_trace = torch.linalg.svdvals(_root(covariance_a) @ _root(covariance_b)).sum()
    distance = (
        (a.mean(0) - b.mean(0)).square().sum()
        + covariance_a.trace()
        + covariance_b.trace()
        - 2 * root_trace
    )
    return FrechetDistance(max(distance.item(), 0.0), name, (len(a), len(b)))


class Features(NamedTuple):
    """A network that turns images into features, and what these are called."""

    name: str
    extract: Callable[[Tensor], Tensor]  # [B, C, H, W] -> [B, F]


def inception_features(
    weights_file: Path | None = None, device: torch.device | str = "cpu"
) -> Features | str:
    """The 2048 pooled features of torchvision's Inception-v3, or why there are none.

    Nothing is downloaded: the weights are `weights_file`, a .safetensors file, or lie where
    torch.hub keeps its checkpoints. torchvision publishes a pickle, which is not opened here; the
    answer where there is no file says how to convert it. The published FIDs use other weights,
    ported from TensorFlow, and another resize, so that none compares with these; the name says so.

    `extract` takes uint8 or floating images on the scale of [0, 1], grey or RGB, of any size
    (resized to 299×299, bilinear with antialiasing), and gives float32 `[B, 2048]` on `device`.

    Raises:
        UserError: for a file that does not hold the weights of this network; when extracting, for
            images with other than one or three channels.
    """
    from torchvision.models import Inception_V3_Weights, inception_v3

    url = Inception_V3_Weights.IMAGENET1K_V1.url
    published = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    file = weights_file or published.with_suffix(".safetensors")
    if not file.is_file():
        return (
            f"the weights of torchvision's Inception-v3 are not at {file}. Download {url} to "
            f"{published} and convert it: python -c 'import torch, safetensors.torch as s; "
            f's.save_file(torch.load("{published}", weights_only=True), "{file}")\''
        )
    # aux_logits: the file holds the auxiliary classifier too. The images come already scaled.
    network = inception_v3(aux_logits=True, transform_input=False, init_weights=False)
    try:
        network.load_state_dict(load_file(file))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(
            f"{file} does not hold the weights of torchvision's Inception-v3 ({url}) in the format "
            "of safetensors"
        ) from error
    network.fc = torch.nn.Identity()
    network.eval().to(device)

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                f"Inception features need images [B, 1 or 3, H, W], got {tuple(images.shape)}"
            )
        x = _unit_scale(images.to(device)).expand(-1, 3, -1, -1)
        x = torch.nn.functional.interpolate(
            x, (299, 299), mode="bilinear", align_corners=False, antialias=True
        )
        return network(2 * x - 1)

    name = (
        f"pool features of torchvision's Inception-v3 with the weights of {file.name} (SHA-256 "
        f"{sha256(file)[:8]}…); not comparable with published FIDs, which use the TensorFlow port"
    )
    return Features(name, extract)


def _unit_scale(images: Tensor) -> Tensor:
    """float32 in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float().clamp(0, 1)


def _covariance(features: Tensor) -> Tensor:
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root; rounding may have left eigenvalues just below zero."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
