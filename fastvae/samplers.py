"""Densities fitted to the latents of a trained model, to sample from in place of its prior.

Where the posteriors of the training images together (the aggregate posterior) do not fill the
prior, samples of the prior meet a decoder that never saw their like. A second density, fitted to
the latents after training, does better (Ghosh et al. 2020, arXiv:1903.12436, section 4). It is a
way to draw images: the bounds on log p(x) stay those of the prior.

A sampler is fitted to `z [N, D]`: the posterior means of the training images, or draws, which are
closer to what the decoder was trained on. Given labels too, it is fitted to each class.
"""

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol, final

import torch
from fastvae_kernels import normal, uniform
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fastvae import noise
from fastvae.errors import UserError

# The stream of random numbers that chooses the component, apart from the one within it.
_COMPONENT = 0x0801F2E2858EFC16

# Rows of z that go through a flow at once.
_ROWS = 8192


class LatentSampler(Protocol):
    """What a sampler answers. `classes` is 0 for one that was fitted without labels."""

    kind: ClassVar[str]
    latent_dim: int
    classes: int

    def sample(
        self, count: int, seed: int, device: torch.device | str, labels: Tensor | None = None
    ) -> Tensor:
        """Draw z `[count, D]` float32; row i is a function of (seed, i) and of label i.

        `labels` int64 `[count]` in [0, classes) are needed where the sampler was fitted with
        labels, and refused with UserError where it was not.
        """

    def log_prob(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """log density of z `[N, D]`, given its labels int64 `[N]` if any: `[N]` float32 nats."""

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The arguments (JSON) and the tensors from which `from_state` makes it again."""

    @classmethod
    def from_state(cls, arguments: dict[str, Any], tensors: dict[str, Tensor]) -> "LatentSampler":
        """The inverse of `state`."""


# ------------------------------------------------------------------------- mixture of Gaussians


@final
class GaussianMixtureSampler:
    """Gaussians of full covariance, mixed; one mixture for each class if there are classes.

    Args:
        weights: `[M]` float64, of the components of all classes together; within a class they
            sum to 1.
        means: `[M, D]` float64.
        cholesky: `[M, D, D]` float64, lower triangles L of the covariances L Lᵀ.
        owner: `[M]` int64, the class each component belongs to; zeros without classes.
        classes: 0 for a sampler that takes no labels.
    """

    kind: ClassVar[str] = "gaussian-mixture"

    def __init__(
        self, weights: Tensor, means: Tensor, cholesky: Tensor, owner: Tensor, classes: int = 0
    ) -> None:
        count, latent_dim = means.shape
        shapes = [tuple(t.shape) for t in (weights, cholesky, owner)]
        if shapes != [(count,), (count, latent_dim, latent_dim), (count,)]:
            raise UserError(
                f"{count} components of {latent_dim} latents have weights ({count},), cholesky "
                f"({count}, {latent_dim}, {latent_dim}) and owner ({count},), got {shapes}"
            )
        if owner.unique().tolist() != list(range(max(classes, 1))):
            raise UserError(f"each of {max(classes, 1)} classes needs a component of its own")
        if min(weights.min(), cholesky.diagonal(dim1=1, dim2=2).min()) <= 0:
            raise UserError("weights, and the diagonals of cholesky, are above 0")
        sums = [weights[owner == k].sum().item() for k in range(max(classes, 1))]
        if max(abs(total - 1) for total in sums) > 1e-4:
            raise UserError(f"the weights of a class sum to 1, got {sums}")
        self.latent_dim, self.classes = latent_dim, classes
        self.weights, self.means = weights.double(), means.double()
        self.cholesky, self.owner = cholesky.double(), owner.long()

    @classmethod
    def fit(
        cls,
        z: Tensor,
        labels: Tensor | None = None,
        *,
        components: int = 10,
        reg_covar: float = 1e-4,
        seed: int = 0,
    ) -> "GaussianMixtureSampler":
        """Fit by expectation–maximisation (scikit-learn's GaussianMixture, begun by k-means).

        Args:
            z: `[N, D]` floating, finite.
            labels: int64 `[N]`, classes 0 … K−1 with at least two rows each; or None.
            components: of the mixture (of each class), at least 1. A class of few rows gets
                fewer, so that D + 1 rows or more fall to each on average.
            reg_covar: added to every variance, as a share of that latent's variance over `z`; it
                keeps covariances regular where rows are few or a latent is not used.
            seed: of the start of the iterations.

        Raises UserError for values that do not fit.
        """
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        classes = _check_fit(z, labels)
        if components < 1:
            raise UserError(f"a mixture has at least 1 component, got components={components}")
        if reg_covar <= 0:
            raise UserError(f"reg_covar is above 0, got {reg_covar}")
        z, center, scale = _standardise(z.detach().double().cpu())
        weights, means, cholesky, owner = [], [], [], []
        for k in range(max(classes, 1)):
            rows = z if labels is None else z[labels.cpu() == k]
            if len(rows) < 2:
                raise UserError(f"class {k} has {len(rows)} rows of z; a mixture needs at least 2")
            mixture = GaussianMixture(
                min(components, max(1, len(rows) // (z.shape[1] + 1))),
                reg_covar=reg_covar,
                max_iter=200,
                random_state=noise.derived_seed("mixture", seed, k) % 2**32,
            )
            with warnings.catch_warnings():
                # The last rounds change little; equal rows make fewer clusters than components.
                warnings.simplefilter("ignore", ConvergenceWarning)
                mixture.fit(rows.numpy())
            weights.append(torch.from_numpy(mixture.weights_))
            means.append(torch.from_numpy(mixture.means_) * scale + center)
            factors = torch.linalg.cholesky(torch.from_numpy(mixture.covariances_))
            cholesky.append(scale[:, None] * factors)
            owner.append(torch.full((mixture.n_components,), k))
        return cls(
            torch.cat(weights), torch.cat(means), torch.cat(cholesky), torch.cat(owner), classes
        )

    def sample(
        self, count: int, seed: int, device: torch.device | str, labels: Tensor | None = None
    ) -> Tensor:
        """As `LatentSampler.sample`: row i is a function of (seed, i) and label i.

        The component is the same on every device, z equal up to float32 rounding.
        """
        labels = _check_labels(labels, count, self.classes)
        choice = uniform((count,), noise.stream(seed, _COMPONENT))
        z = normal((count, self.latent_dim), seed, device=device)
        for k, rows in _groups(labels):
            of_class = (self.owner == k).nonzero()[:, 0]
            ends = self.weights[of_class].cumsum(0)
            places = torch.searchsorted((ends / ends[-1]).float(), choice[rows], right=True)
            for component, within in _groups(of_class[places]):
                chosen = rows[within].to(device)
                factor = self.cholesky[component].float().to(device)
                z[chosen] = self.means[component].float().to(device) + z[chosen] @ factor.T
        return z

    def log_prob(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """As `LatentSampler.log_prob`; computed in float64 on the CPU."""
        _check_width(z, self.latent_dim)
        labels = _check_labels(labels, len(z), self.classes)
        values, result = z.double().cpu(), torch.empty(len(z), dtype=torch.float64)
        for k, rows in _groups(labels):
            terms = []
            for component in (self.owner == k).nonzero()[:, 0]:
                factor, mean = self.cholesky[component], self.means[component]
                white = torch.linalg.solve_triangular(factor, (values[rows] - mean).T, upper=False)
                log_norm = factor.diagonal().log().sum() + self.latent_dim / 2 * math.log(
                    2 * math.pi
                )
                terms.append(self.weights[component].log() - log_norm - white.square().sum(0) / 2)
            result = result.index_copy(0, rows, torch.stack(terms).logsumexp(0))
        return result.float().to(z.device)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `LatentSampler.state`."""
        names = ("weights", "means", "cholesky", "owner")
        return {"classes": self.classes}, {name: getattr(self, name) for name in names}

    @classmethod
    def from_state(
        cls, arguments: dict[str, Any], tensors: dict[str, Tensor]
    ) -> "GaussianMixtureSampler":
        """See `LatentSampler.from_state`."""
        return cls(
            tensors["weights"],
            tensors["means"],
            tensors["cholesky"],
            tensors["owner"],
            arguments["classes"],
        )


# -------------------------------------------------------------------------------------- flow


@final
class FlowSampler:
    """An autoregressive neural spline flow (Durkan et al. 2019, arXiv:1906.04032), by zuko.

    With classes, the flow is conditioned on the one-hot label. Made by `fit` or `load_sampler`;
    needs the package zuko, and says so with UserError where it is missing.

    Args:
        latent_dim: D.
        classes: 0 for a sampler that takes no labels.
        transforms: how many autoregressive spline transformations follow each other.
        hidden: widths of the masked network of each.
        bins: of each spline.
    """

    kind: ClassVar[str] = "flow"

    def __init__(
        self,
        latent_dim: int,
        classes: int = 0,
        transforms: int = 3,
        hidden: tuple[int, ...] = (128, 128),
        bins: int = 8,
    ) -> None:
        self.latent_dim, self.classes = latent_dim, classes
        self._arguments = {
            "latent_dim": latent_dim,
            "classes": classes,
            "transforms": transforms,
            "hidden": list(hidden),
            "bins": bins,
        }
        self._center, self._scale = torch.zeros(latent_dim), torch.ones(latent_dim)
        self._flow: nn.Module = _zuko().flows.NSF(
            latent_dim, classes, bins, transforms=transforms, hidden_features=tuple(hidden)
        )

    @classmethod
    @torch.enable_grad()
    def fit(
        cls,
        z: Tensor,
        labels: Tensor | None = None,
        *,
        transforms: int = 3,
        hidden: tuple[int, ...] = (128, 128),
        bins: int = 8,
        steps: int = 2000,
        batch_size: int = 256,
        learning_rate: float = 3e-3,
        patience: int = 500,
        seed: int = 0,
    ) -> "FlowSampler":
        """Fit by maximum likelihood: Adam with a cosine schedule, stopped early.

        The log-density of a tenth of the rows, kept out of training, is measured once an epoch,
        or every 100 steps if that is sooner; the weights of its best value are returned, and
        training ends `patience` steps after it, at the latest after `steps`. On one CPU core 2,000
        steps on 20 latents take half a minute, whatever N.

        Args:
            z: `[N, D]` floating, finite, N ≥ 20; the fit runs on its device.
            labels: int64 `[N]`, classes 0 … K−1, each with a row; or None.
            transforms, hidden, bins: see the class.
            seed: of the weights, the held-out tenth and the order of the rows.

        Raises UserError for values that do not fit, or where the fit diverged.
        """
        classes = _check_fit(z, labels)
        if len(z) < 20:
            raise UserError(f"a flow needs at least 20 rows of z, got {len(z)}")
        values, center, scale = _standardise(z.detach().float())
        context = None if labels is None else _one_hot(labels.to(z.device), classes)
        generator = torch.Generator().manual_seed(noise.derived_seed("flow", seed))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(noise.derived_seed("flow weights", seed))
            sampler = cls(z.shape[1], classes, transforms, hidden, bins)
        flow = sampler._flow.to(z.device)

        def nll(rows: Tensor) -> Tensor:
            rows = rows.to(z.device)
            return -flow(None if context is None else context[rows]).log_prob(values[rows])

        order = torch.randperm(len(z), generator=generator)
        heldout, training = order[: len(z) // 10], order[len(z) // 10 :]
        optimizer = torch.optim.Adam(flow.parameters(), learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        interval = min(100, max(10, len(training) // batch_size))
        best, best_step, best_state = math.inf, 0, None
        for step in range(1, steps + 1):
            rows = training[torch.randint(len(training), (batch_size,), generator=generator)]
            optimizer.zero_grad()
            nll(rows).mean().backward()
            nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            if step % interval == 0 or step == steps:
                with torch.no_grad():
                    score = torch.cat([nll(part) for part in heldout.split(_ROWS)]).mean().item()
                if score < best:
                    best, best_step = score, step
                    best_state = {name: value.clone() for name, value in flow.state_dict().items()}
                if step - best_step >= patience:
                    break
        if best_state is None:
            raise UserError(
                f"the fit of the flow diverged; lower its learning_rate (it was {learning_rate})"
            )
        flow.load_state_dict(best_state)
        flow.requires_grad_(False)
        sampler._center, sampler._scale = center, scale
        return sampler

    @torch.no_grad()
    def sample(
        self, count: int, seed: int, device: torch.device | str, labels: Tensor | None = None
    ) -> Tensor:
        """As `LatentSampler.sample`: row i is a function of (seed, i) and label i.

        That is exact for the noise. The networks round otherwise in a batch of another size or on
        another device, and a spline can magnify what they round: expect agreement to 1e-3.
        """
        self._to(device)
        labels = _check_labels(labels, count, self.classes).to(device)
        parts = [torch.empty(0, self.latent_dim, device=device)]
        for start in range(0, count, _ROWS):
            context = self._context(labels[start : start + _ROWS])
            shape = (min(_ROWS, count - start), self.latent_dim)
            eps = normal(shape, seed, offset=start, device=device)
            parts.append(self._flow(context).transform.inv(eps))
        return torch.cat(parts) * self._scale + self._center

    def log_prob(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """See `LatentSampler.log_prob`; the flow moves to the device of z."""
        _check_width(z, self.latent_dim)
        self._to(z.device)
        labels = _check_labels(labels, len(z), self.classes).to(z.device)
        values = (z.float() - self._center) / self._scale
        parts = [torch.empty(0, device=z.device)]
        for part, label in zip(values.split(_ROWS), labels.split(_ROWS), strict=True):
            parts.append(self._flow(self._context(label)).log_prob(part))
        return torch.cat(parts) - self._scale.log().sum()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `LatentSampler.state`."""
        flow = {f"flow.{name}": value for name, value in self._flow.state_dict().items()}
        return dict(self._arguments), {"center": self._center, "scale": self._scale, **flow}

    @classmethod
    def from_state(cls, arguments: dict[str, Any], tensors: dict[str, Tensor]) -> "FlowSampler":
        """See `LatentSampler.from_state`."""
        sampler = cls(**arguments)
        flow = {k.removeprefix("flow."): v for k, v in tensors.items() if k.startswith("flow.")}
        sampler._flow.load_state_dict(flow)
        sampler._flow.requires_grad_(False)
        center, scale = tensors["center"], tensors["scale"]
        if not center.shape == scale.shape == (sampler.latent_dim,) or scale.min() <= 0:
            raise UserError(f"center and scale are ({sampler.latent_dim},), and scale above 0")
        sampler._center, sampler._scale = center, scale
        return sampler

    def _to(self, device: torch.device | str) -> None:
        self._flow.to(device)
        self._center, self._scale = self._center.to(device), self._scale.to(device)

    def _context(self, labels: Tensor) -> Tensor | None:
        return _one_hot(labels, self.classes) if self.classes else None


def _zuko() -> Any:
    try:
        import zuko
    except ImportError as error:
        raise UserError("a flow needs the package zuko: pip install 'fastvae[flows]'") from error
    return zuko


# ------------------------------------------------------------------------- saving and loading

_KINDS: dict[str, type[LatentSampler]] = {
    sampler.kind: sampler  # type: ignore[type-abstract]
    for sampler in (GaussianMixtureSampler, FlowSampler)
}


def save_sampler(sampler: LatentSampler, path: Path) -> None:
    """Write a sampler as one safetensors file, its kind and arguments as JSON in the metadata.

    Raises UserError where the file cannot be written.
    """
    arguments, tensors = sampler.state()
    metadata = {"kind": sampler.kind, "arguments": json.dumps(arguments)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, path, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error


def load_sampler(path: Path) -> LatentSampler:
    """Read what `save_sampler` wrote, on the CPU.

    Raises UserError where there is no file, a damaged one, or one of something else.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read a sampler from {path}: {error}") from error
    if metadata.get("kind") not in _KINDS:
        raise UserError(
            f"{path} holds no sampler: its kind is {metadata.get('kind')!r}, and there are: "
            f"{', '.join(_KINDS)}"
        )
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"the sampler in {path} is damaged: a value in it is not finite")
    try:
        return _KINDS[metadata["kind"]].from_state(json.loads(metadata["arguments"]), tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"the sampler in {path} cannot be used: {reason}") from error


# ------------------------------------------------------------------------------------- common


def _standardise(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z with mean 0 and variance 1 in each latent, and the mean and scale taken from it."""
    center, scale = z.mean(0), z.std(0).clamp_min(1e-6)
    return (z - center) / scale, center, scale


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels, classes).float()


def _groups(labels: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each value of `labels [N]`, with the rows that have it."""
    for value in labels.unique().tolist():
        yield value, (labels == value).nonzero()[:, 0]


def _check_fit(z: Tensor, labels: Tensor | None) -> int:
    """The number of classes; UserError where z or labels cannot be fitted to."""
    if z.dim() != 2 or not z.is_floating_point() or z.shape[1] < 1 or len(z) < 2:
        raise UserError(
            f"a sampler is fitted to floating z [N, D] with N ≥ 2, got {z.dtype} {tuple(z.shape)}"
        )
    if not z.isfinite().all():
        raise UserError("a sampler is fitted to finite latents; z holds a NaN or infinity")
    if labels is None:
        return 0
    if labels.shape != z.shape[:1] or labels.dtype != torch.int64:
        raise UserError(
            f"labels are int64 ({len(z)},) here, got {labels.dtype} {tuple(labels.shape)}"
        )
    found = labels.unique().tolist()
    if found != list(range(len(found))):
        raise UserError(f"labels are 0 … K−1 and each has a row of z; these occur: {found}")
    return len(found)


def _check_labels(labels: Tensor | None, count: int, classes: int) -> Tensor:
    """Labels int64 `[count]` on the CPU: those given, or zeros for a sampler without classes."""
    if not classes:
        if labels is not None:
            raise UserError("this sampler was fitted without labels and takes none")
        return torch.zeros(count, dtype=torch.int64)
    if labels is None:
        raise UserError(f"this sampler was fitted to {classes} classes: pass labels")
    labels = labels.cpu()
    if labels.shape != (count,) or labels.dtype != torch.int64:
        raise UserError(f"labels are int64 ({count},), got {labels.dtype} {tuple(labels.shape)}")
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UserError(
            f"labels lie in [0, {classes}), got {int(labels.min())} to {int(labels.max())}"
        )
    return labels


def _check_width(z: Tensor, latent_dim: int) -> None:
    if z.dim() != 2 or z.shape[1] != latent_dim:
        raise UserError(f"z has shape (N, {latent_dim}) here, got {tuple(z.shape)}")
