"""What a linear model can read from the posterior means."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.errors import UserError


class ProbeScore(NamedTuple):
    """How well a linear probe answers on held-out images.

    Attributes:
        score: see `metric`.
        metric: "accuracy", the share of right classes, or "r2", the share of the targets'
            variance that is explained (1 is all, 0 no more than their mean does).
        train_images, held_out_images: how many were used.
        converged: False if the logistic regression stopped at its limit of iterations.
    """

    score: float
    metric: str
    train_images: int
    held_out_images: int
    converged: bool


def linear_probe(
    train_mu: Tensor,
    train_labels: Tensor,
    held_out_mu: Tensor,
    held_out_labels: Tensor,
    *,
    max_train: int = 10_000,
    seed: int = 0,
    max_iterations: int = 1000,
) -> ProbeScore:
    """Fit a linear probe to the training images' means, and score it on held-out ones.

    Integer labels: multinomial logistic regression with an L2 penalty of C = 1, and its accuracy.
    Real targets: ridge regression with α = 1, and R². Features are standardised by the training
    images. The same numbers always give the same score.

    Args:
        train_mu, held_out_mu: `[N, D]` and `[M, D]`.
        train_labels, held_out_labels: integers `[N]` and `[M]`, or floating.
        max_train: if there are more training images, as many are chosen at random.
        seed: of that choice.

    Raises:
        UserError: for shapes that do not fit, values that are not finite, or a single class.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    _check(train_mu, train_labels, held_out_mu, held_out_labels)
    if len(train_mu) > max_train:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(train_mu), generator=generator)[:max_train]
        train_mu, train_labels = (
            train_mu[chosen.to(train_mu.device)],
            train_labels[chosen.to(train_labels.device)],
        )
    real = train_labels.is_floating_point()
    if not real and len(train_labels.unique()) < 2:
        raise UserError("a linear probe needs at least two classes among the training labels")
    model = Ridge() if real else LogisticRegression(max_iter=max_iterations)
    probe = make_pipeline(StandardScaler(), model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is said in the score
        probe.fit(_numpy(train_mu), _numpy(train_labels))
    return ProbeScore(
        score=float(probe.score(_numpy(held_out_mu), _numpy(held_out_labels))),
        metric="r2" if real else "accuracy",
        train_images=len(train_mu),
        held_out_images=len(held_out_mu),
        converged=real or bool(max(model.n_iter_) < max_iterations),
    )


def _numpy(values: Tensor):  # type: ignore[no-untyped-def]
    return (values.double() if values.is_floating_point() else values).detach().cpu().numpy()


def _check(train_mu: Tensor, train_labels: Tensor, mu: Tensor, labels: Tensor) -> None:
    for name, features, targets in (
        ("training", train_mu, train_labels),
        ("held-out", mu, labels),
    ):
        fits = features.dim() == 2 and len(features) > 0 and features.shape[1] == mu.shape[-1]
        if not fits or targets.shape != features.shape[:1]:
            raise UserError(
                f"the {name} images need means [N, D] and labels [N], "
                f"got {tuple(features.shape)} and {tuple(targets.shape)}"
            )
        if not (features.isfinite().all() and targets.isfinite().all()):
            raise UserError(f"the means or labels of the {name} images are not all finite")
    if train_labels.is_floating_point() != labels.is_floating_point():
        raise UserError(
            "training and held-out labels must both be classes or both real, "
            f"got {train_labels.dtype} and {labels.dtype}"
        )
