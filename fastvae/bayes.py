"""The other model: a network that predicts labels, with a distribution over its weights."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import torch
from fastvae_kernels import Impl, reparameterize_kl
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from fastvae import noise, saving
from fastvae.batch import Batch
from fastvae.errors import UserError
from fastvae.parts.label_likelihoods import LabelLikelihood
from fastvae.parts.networks import ACTIVATIONS, ImageShape, pixels
from fastvae.parts.spec import build_part, spec_of
from fastvae.parts.terms import Terms

# Of q(w) before training, in units of the prior's: narrow, so that learning begins as it does
# without noise.
INITIAL_STD = 0.03
# Floating values of weights or activations that predictions hold at once: what a cache holds.
CHUNK = 2**20

SPEC_KEYS = (
    "image_shape", "dataset_size", "rows_per_draw", "hidden", "activation", "weight_std",
    "likelihood",
)  # fmt: skip


@final
class BayesianNetwork(
    nn.Module,
    ModelHubMixin,
    library_name="fastvae",
    tags=["bayesian-neural-network", "variational-inference"],
):
    """p(y | x, w) with a mean-field Gaussian q(w): Blundell et al. 2015 (arXiv:1505.05424).

    The ELBO of a training set of N rows is Σ_n E_q[log p(y_n | x_n, w)] − KL(q(w) ‖ p(w)). Each row
    has its share of it as its terms: `nll` and `kl` = KL / N, so that their mean is −ELBO / N.

    The prior of a weight is N(0, weight_std² / inputs of its layer), so that it says the same of
    the function however wide a layer is (Neal 1996, chapter 2), that of a bias N(0, weight_std²).
    All P of them live in one vector, in units of their prior's standard deviation: there the prior
    is N(0, 1), and drawing them and their KL is one call of a fused kernel.

    Args:
        likelihood: p(y | x, w), a `CategoricalLabels` or `GaussianTargets`.
        image_shape: (C, H, W) of the inputs, which are flattened.
        dataset_size: N.
        rows_per_draw: training rows that share one draw of the weights: the batch size over all
            processes, so that it matters nowhere how a batch is cut.
        hidden, activation: of the fully connected network.
        weight_std: of the prior.
        impl: which kernel: "auto", "triton" or "torch".
    """

    is_bound = True
    """−(nll + kl) bounds log p(y | x) of the training set from below, summed over its rows."""

    def __init__(
        self,
        likelihood: LabelLikelihood,
        *,
        image_shape: ImageShape,
        dataset_size: int,
        rows_per_draw: int,
        hidden: tuple[int, ...] = (400, 400),
        activation: str = "relu",
        weight_std: float = 4.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise UserError(f"image_shape is (channels, height, width), got {tuple(image_shape)}")
        if min(dataset_size, rows_per_draw, *hidden) < 1:
            raise UserError(
                "dataset_size, rows_per_draw and hidden sizes are at least 1, "
                f"got {dataset_size}, {rows_per_draw} and {tuple(hidden)}"
            )
        if activation not in ACTIVATIONS:
            raise UserError(f"activation is one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if not (math.isfinite(weight_std) and weight_std > 0):
            raise UserError(f"weight_std is positive, got {weight_std}")
        self.image_shape: ImageShape = tuple(image_shape)  # type: ignore[assignment]
        self.dataset_size = dataset_size
        self.rows_per_draw = rows_per_draw
        self.hidden = tuple(hidden)
        self.activation_name = activation
        self.weight_std = weight_std
        self.impl: Impl = impl
        self.likelihood = likelihood
        self.activation = ACTIVATIONS[activation]()
        self.layers = tuple(pairwise((math.prod(image_shape), *hidden, likelihood.num_outputs)))
        """Inputs and outputs of each layer. In `mu` lie its weights [inputs, outputs], its biases,
        and then the next layer's."""
        self.mu = nn.Parameter(self._initial_mu())
        self.logvar = nn.Parameter(torch.full_like(self.mu, 2.0 * math.log(INITIAL_STD)))

    def _initial_mu(self) -> Tensor:
        """What nn.Linear begins with, in units of the prior's standard deviation: `[P]`."""
        values = []
        for inputs, outputs in self.layers:
            bound = 1.0 / math.sqrt(inputs)
            weight = torch.empty(inputs * outputs).uniform_(-bound, bound)
            bias = torch.empty(outputs).uniform_(-bound, bound)
            values += [weight / self._weight_scale(inputs), bias / self.weight_std]
        return torch.cat(values)

    def _weight_scale(self, inputs: int) -> float:
        """The prior's standard deviation of the weights of a layer."""
        return self.weight_std / math.sqrt(inputs)

    # ------------------------------------------------------------------ the terms of the bound

    def forward(
        self, batch: Batch, seed: int | Tensor, offset: int | Tensor = 0, num_samples: int = 1
    ) -> Terms:
        """−log p(y | x, w) of each row for `num_samples` draws of w, and its share of the KL.

        Args:
            batch: B rows with their labels.
            seed: the run's seed, an int or an int64 tensor on the rows' device: one element, or
                what `fastvae.noise.all_streams` made of it.
            offset: the number of rows that the run met before, likewise. Rows meet the draw number
                offset // rows_per_draw; outside of training (`eval()`) all meet draw 0, so that a
                measurement depends on (seed, model) alone.
            num_samples: S.

        Returns:
            `Terms`, float32 in nats: `nll` `[S, B]` and `kl` `[B]`.
        """
        if batch.labels is None:
            raise UserError("a network that predicts labels needs them in the batch")
        draw = offset // self.rows_per_draw if self.training else 0
        z, kl = reparameterize_kl(
            self.mu.unsqueeze(0),
            self.logvar.unsqueeze(0),
            noise.stream(seed, noise.WEIGHTS),
            offset=draw,
            num_samples=num_samples,
            impl=self.impl,
        )
        nll = self.likelihood.nll(self.outputs(batch.x, z.squeeze(1)), batch.labels)
        return Terms(nll, (kl / self.dataset_size).expand(batch.rows))

    def outputs(self, x: Tensor, z: Tensor) -> Tensor:
        """What the network gives: `[B, C, H, W]`, weights `[S, P]` → `[S, B, num_outputs]`."""
        if tuple(x.shape[1:]) != self.image_shape:
            raise UserError(
                f"this network takes images {('N', *self.image_shape)} (N, channels, height, "
                f"width), got {tuple(x.shape)}"
            )
        sizes = [size for inputs, outputs in self.layers for size in (inputs * outputs, outputs)]
        parts = z.split(sizes, dim=1)
        h = pixels(x).flatten(1).expand(len(z), -1, -1)
        for i, (inputs, outputs) in enumerate(self.layers):
            weight = parts[2 * i].unflatten(1, (inputs, outputs))
            bias = parts[2 * i + 1].unsqueeze(1)
            # The prior's standard deviations, without a copy of the weights.
            h = torch.baddbmm(
                bias, h, weight, beta=self.weight_std, alpha=self._weight_scale(inputs)
            )
            if i < len(self.layers) - 1:
                h = self.activation(h)
        return h

    # --------------------------------------------------------------------- using a trained model

    def check_labels(self, labels: Tensor | None) -> None:
        """Raise UserError unless the network can be trained or evaluated on data with these."""
        self.likelihood.check(labels)

    def predict(self, x: Tensor, *, num_samples: int = 100, seed: int = 0) -> Any:
        """p(y | x), the mean of p(y | x, w) over draws of w from q.

        Args:
            x: `[B, C, H, W]` as stored.
            num_samples: draws of the weights, the same ones for all rows.
            seed: of the draws.

        Returns:
            For classes their probabilities, float32 `[B, K]`; for real targets a
            `TargetPrediction`, mean and standard deviation, each float32 `[B]`.
        """

        def pool(outputs: Tensor, rows: slice) -> Tensor:
            return self.likelihood.pool(outputs)

        found = self.over_draws(x, pool, self.likelihood.join, num_samples=num_samples, seed=seed)
        return self.likelihood.predict(found, num_samples)

    def log_predictive(
        self, x: Tensor, labels: Tensor, *, num_samples: int = 100, seed: int = 0
    ) -> Tensor:
        """log p(y | x) = log mean_s p(y | x, w_s): float32 `[B]` nats; arguments as `predict`."""
        self.check_labels(labels)

        def pool(outputs: Tensor, rows: slice) -> Tensor:
            return torch.logsumexp(-self.likelihood.nll(outputs, labels[rows]), dim=0)

        found = self.over_draws(x, pool, torch.logaddexp, num_samples=num_samples, seed=seed)
        return found - math.log(num_samples)

    @torch.no_grad()
    def over_draws(
        self,
        x: Tensor,
        pool: Callable[[Tensor, slice], Tensor],
        join: Callable[[Tensor, Tensor], Tensor],
        *,
        num_samples: int,
        seed: int,
    ) -> Tensor:
        """Something of the outputs for draws of the weights, joined over all draws: `[B, …]`.

        `pool` makes of the outputs of some draws for some rows, `[s, b, num_outputs]`, what is
        joined, `[b, …]`. Draws and rows are taken a part at a time, which bounds the memory.
        """
        if num_samples < 1:
            raise UserError(f"num_samples is at least 1, got {num_samples}")
        found: dict[int, Tensor] = {}
        for rows, outputs in self._in_parts(x, num_samples, seed):
            part = pool(outputs, rows)
            known = found.get(rows.start)
            found[rows.start] = part if known is None else join(known, part)
        return torch.cat(list(found.values()))

    def _in_parts(self, x: Tensor, num_samples: int, seed: int) -> Iterator[tuple[slice, Tensor]]:
        widest = max(math.prod(self.image_shape), *(outputs for _, outputs in self.layers))
        most_draws = max(1, CHUNK // len(self.mu))
        most_rows = max(1, CHUNK // (widest * min(most_draws, num_samples)))
        # Other draws than training's: draw s is row s of its stream.
        stream = noise.stream(noise.derived_seed("predictive", seed), noise.WEIGHTS)
        for first in range(0, num_samples, most_draws):
            count = min(most_draws, num_samples - first)
            mu, logvar = (p.expand(count, -1) for p in (self.mu, self.logvar))
            z, _ = reparameterize_kl(mu, logvar, stream, offset=first, impl=self.impl)
            for start in range(0, len(x), most_rows):
                rows = slice(start, min(start + most_rows, len(x)))
                yield rows, self.outputs(x[rows], z)

    # ------------------------------------------------------------------------- saving, loading

    def spec(self) -> dict[str, Any]:
        """What config.json holds."""
        return {
            "model": "bayesian-network",
            "image_shape": list(self.image_shape),
            "dataset_size": self.dataset_size,
            "rows_per_draw": self.rows_per_draw,
            "hidden": list(self.hidden),
            "activation": self.activation_name,
            "weight_std": self.weight_std,
            "likelihood": spec_of(self.likelihood),  # type: ignore[arg-type]
        }

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write config.json and model.safetensors into an existing folder."""
        saving.save_model(self, save_directory)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **options: Any
    ) -> "BayesianNetwork":
        """Load a network from a run's folder, a folder that was saved, or a name on the Hub.

        `options` are `map_location`, the device to load on, and huggingface_hub's own (`revision`,
        `token`, …). Raises UserError where there is no network, or a damaged one.
        """
        name = str(pretrained_model_name_or_path)
        with saving.reading(name):
            return super().from_pretrained(name, **options)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, map_location: str = "cpu", **options: Any
    ) -> "BayesianNetwork":
        return saving.load_model(model_id, "bayesian-network", build_network, map_location, options)


def build_network(spec: dict[str, Any]) -> BayesianNetwork:
    """Make the network that `BayesianNetwork.spec()` describes, with fresh weights.

    Raises UserError where the spec is incomplete or names an unknown likelihood.
    """
    if missing := [key for key in SPEC_KEYS if key not in spec]:
        raise UserError(f"the network's {saving.CONFIG_NAME} lacks {', '.join(missing)}")
    return BayesianNetwork(
        build_part("label-likelihood", spec["likelihood"]),  # type: ignore[arg-type]
        image_shape=tuple(spec["image_shape"]),  # type: ignore[arg-type]
        dataset_size=spec["dataset_size"],
        rows_per_draw=spec["rows_per_draw"],
        hidden=tuple(spec["hidden"]),
        activation=spec["activation"],
        weight_std=spec["weight_std"],
    )
