"""Settings that do not go together are refused by name; all that do make a model that learns."""

import itertools
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from small_models import grey_set

from fastvae import Batch, combinations
from fastvae.build import build_model, build_objective
from fastvae.combinations import why_impossible, why_unread
from fastvae.config import Config, ModelConfig, ObjectiveConfig, OptimizerConfig, from_json
from fastvae.data import DataConfig
from fastvae.errors import UserError
from fastvae.presets import PRESETS, preset
from fastvae.training import train
from fastvae.training.loop import make_optimizer
from fastvae.training.schedule import learning_rate
from fastvae.training.step import TrainingStep


def configured(**settings: Any) -> Config:
    """A configuration that a run may begin with, by the names of settings alone."""

    def take(kind: Any) -> Any:
        return kind(**{k: settings.pop(k) for k in get_type_hints(kind) if k in settings})

    model, objective, optimizer = take(ModelConfig), take(ObjectiveConfig), take(OptimizerConfig)
    config = Config(model=model, objective=objective, optimizer=optimizer, **settings)
    if reason := why_unread(config):
        raise UserError(reason)
    return config


DETERMINISTIC = {"posterior": "deterministic"}
FLOW = {"posterior": "inverse-autoregressive"}
WEIGHTED = {"objective": "importance-weighted", "num_samples": 4}
LABELS = {"target": "labels"}

# What does not go together, and the flags that the message names.
IMPOSSIBLE: list[tuple[dict[str, Any], list[str]]] = [
    (DETERMINISTIC | WEIGHTED, ["--posterior deterministic", "--objective importance-weighted"]),
    (
        DETERMINISTIC | {"objective": "total-correlation"},
        ["--posterior deterministic", "--objective total-correlation"],
    ),
    (DETERMINISTIC | {"free_bits": 0.1}, ["--posterior deterministic", "--free-bits"]),
    (DETERMINISTIC | {"capacity": 5.0}, ["--posterior deterministic", "--capacity"]),
    (DETERMINISTIC | {"kl_warmup_epochs": 1.0}, ["--posterior deterministic", "--kl-warmup"]),
    (DETERMINISTIC | {"beta": 4.0}, ["--posterior deterministic", "--beta"]),
    (DETERMINISTIC | {"num_samples": 2}, ["--posterior deterministic", "--num-samples must be 1"]),
    (DETERMINISTIC | {"prior": "mixture"}, ["--posterior deterministic", "--prior none"]),
    (DETERMINISTIC | {"prior": "vamp"}, ["--posterior deterministic", "--objective mmd"]),
    (
        DETERMINISTIC | {"prior": "class-normal", "conditional": True},
        ["--posterior deterministic", "--prior none"],
    ),
    (
        DETERMINISTIC | {"prior": "mixture", "objective": "mmd"},
        ["--prior mixture", "--posterior deterministic", "standard-normal"],
    ),
    ({"prior": "none"}, ["--prior none", "--posterior deterministic"]),
    (DETERMINISTIC | {"prior": "none", "objective": "mmd"}, ["--prior none", "--objective elbo"]),
    ({"prior": "class-normal"}, ["--prior class-normal", "--conditional"]),
    ({"prior": "vamp", "conditional": True}, ["--prior vamp", "--conditional"]),
    ({"prior": "vamp", "inference": "table"}, ["--prior vamp", "--inference table"]),
    (FLOW | {"prior": "vamp"}, ["--prior vamp", "--posterior inverse-autoregressive"]),
    ({"inference": "table", "data": DataConfig(flip=True)}, ["--flip", "--inference table"]),
    (
        {"inference": "table", "objective": "total-correlation"},
        ["--objective total-correlation", "--inference table"],
    ),
    ({"free_bits": 0.1, "prior": "mixture"}, ["--free-bits", "--prior standard-normal"]),
    ({"free_bits": 0.1, "prior": "vamp"}, ["--free-bits", "--prior standard-normal"]),
    (FLOW | {"free_bits": 0.1}, ["--posterior inverse-autoregressive", "--free-bits"]),
    (
        FLOW | {"objective": "total-correlation"},
        ["--posterior inverse-autoregressive", "--objective total-correlation"],
    ),
    (FLOW | WEIGHTED | {"gradient": "doubly-reparameterized"}, ["--gradient doubly", "diagonal"]),
    (FLOW | WEIGHTED | {"groups": 2, "decoder_draws": "all"}, ["--decoder-draws all", "diagonal"]),
    (
        {"objective": "total-correlation", "prior": "mixture"},
        ["--objective total-correlation", "--prior standard-normal"],
    ),
    (WEIGHTED | {"binarize": "none"}, ["--objective importance-weighted", "--binarize none"]),
    (WEIGHTED | {"decoder_draws": "all"}, ["--decoder-draws all", "--groups"]),
    (
        {"gradient_accumulation_steps": 2, "objective": "total-correlation"},
        ["--objective total-correlation", "--gradient-accumulation-steps must be 1"],
    ),
    (
        {"gradient_accumulation_steps": 2, "objective": "mmd"},
        ["mmd", "--gradient-accumulation-steps must be 1"],
    ),
    (
        {"gradient_accumulation_steps": 2, "likelihood": "gaussian", "variance": "optimal"},
        ["--variance optimal", "--gradient-accumulation-steps must be 1"],
    ),
    ({"objective": "mmd", "batch_size": 1}, ["mmd", "--batch-size must be at least 2"]),
    ({"refine_steps": 3, "compile": "on"}, ["--refine-steps", "--compile on"]),
    (
        {"refine_steps": 3, "likelihood": "gaussian", "variance": "optimal"},
        ["--variance optimal", "--refine-steps"],
    ),
    ({"refine_rate": 0.1}, ["--refine-rate", "--refine-steps"]),
    ({"kl_cycle_epochs": 2.0}, ["--kl-cycle-epochs", "--kl-warmup-epochs"]),
    ({"capacity_epochs": 2.0}, ["--capacity-epochs", "--capacity"]),
    (LABELS | {"latent_dim": 3}, ["--latent-dim", "--target labels"]),
    (LABELS | {"likelihood": "gaussian"}, ["--likelihood", "--target labels"]),
    (LABELS | {"widths": (4, 8)}, ["--widths", "--target labels"]),
    (LABELS | {"free_bits": 1.0}, ["--free-bits", "--target labels"]),
    (LABELS | WEIGHTED, ["--target labels", "--objective importance-weighted"]),
    (LABELS | {"network": "conv"}, ["--target labels", "--network mlp"]),
]

# A value, not the default, of each setting that only some choice reads.
CHANGED: dict[str, Any] = {
    "posterior_scale": "softplus",
    "flow_layers": 3,
    "prior_components": 7,
    "variance": 0.2,
    "min_std": 0.1,
    "levels": 8,
    "mixtures": 3,
    "widths": (4, 8),
    "pooling": True,
    "weight_std": 2.0,
    "num_samples": 4,
    "beta": 2.0,
    "kl_warmup_epochs": 1.0,
    "kl_cycle_epochs": 2.0,
    "free_bits": 0.1,
    "capacity": 3.0,
    "capacity_epochs": 1.0,
    "groups": 2,
    "elbo_share": 0.5,
    "gradient": "doubly-reparameterized",
    "decoder_draws": "all",
    "mutual_information_weight": 2.0,
    "total_correlation_weight": 2.0,
    "dimension_weight": 2.0,
    "mmd_weight": 2.0,
    "lr_step_epochs": 3.0,
    "lr_step_factor": 0.1,
    "momentum": 0.5,
}
# What else a choice or a setting needs, to be allowed.
NEEDS: dict[tuple[str, Any], dict[str, Any]] = {
    ("variance", "predicted"): {"likelihood": "gaussian"},
    ("variance", "optimal"): {"likelihood": "gaussian"},
    ("variance", 0.2): {"likelihood": "gaussian"},
    ("prior", "none"): DETERMINISTIC,
    ("prior", "class-normal"): {"conditional": True},
    ("groups", 2): {"num_samples": 4},
    ("gradient", "doubly-reparameterized"): {"num_samples": 4},
    ("decoder_draws", "all"): {"num_samples": 4, "groups": 2},
    ("kl_cycle_epochs", 2.0): {"kl_warmup_epochs": 1.0},
    ("capacity_epochs", 1.0): {"capacity": 2.0},
}
OWNERS = {
    **combinations._MODEL_OWNERS,
    **combinations._OBJECTIVE_OWNERS,
    **combinations._OPTIMIZER_OWNERS,
}


def kind_of(setting: str) -> Any:
    """The part of the configuration that has a setting."""
    kinds = (ModelConfig, ObjectiveConfig, OptimizerConfig)
    return next(kind for kind in kinds if setting in get_type_hints(kind))


def choices_of(setting: str) -> list[Any]:
    """The words that a setting may be; of one that may be a number too, one of those."""
    hint = get_type_hints(kind_of(setting))[setting]
    words = get_args(hint)
    if float in words:
        words = (*(get_args(words[0]) or words[:-1]), 0.2)
    return list(words)


@pytest.mark.parametrize(("settings", "flags"), IMPOSSIBLE, ids=lambda x: "")
def test_impossible_combinations(settings: dict[str, Any], flags: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        configured(**settings)
    for flag in flags:
        assert flag in str(caught.value)


def test_every_rule_is_met_above() -> None:
    reasons = set()
    for settings, _ in IMPOSSIBLE:
        with pytest.raises(UserError) as caught:
            configured(**settings)
        reasons.add(str(caught.value))
    assert {reason for _, reason in combinations._RULES} <= reasons


@pytest.mark.parametrize("setting", OWNERS)
def test_a_setting_that_no_choice_reads(setting: str) -> None:
    """Refused under each choice that does not read it, allowed under each that does."""
    choice, readers = OWNERS[setting]
    new = CHANGED[setting]
    assert new != getattr(kind_of(setting)(), setting)
    for value in choices_of(choice):
        settings = {**NEEDS.get((choice, value), {}), choice: value, setting: new}
        if value in readers:
            assert configured(**(NEEDS.get((setting, new), {}) | settings))
            continue
        named = setting
        if setting == "groups":  # which divide the draws, so that there must be as many
            settings["num_samples"] = new
            named = setting if value in OWNERS["num_samples"][1] else "num_samples"
        with pytest.raises(UserError) as caught:
            configured(**settings)
        flag, readers_of_it = named.replace("_", "-"), " or ".join(OWNERS[named][1])
        expected = f"--{flag} belongs to --{choice} {readers_of_it}, got --{choice} {value}"
        assert str(caught.value) == expected


def made(**settings: Any) -> Any:
    """What a run is made of, from settings that nobody has checked together."""
    data = grey_set(8, (1, 4, 3), classes=2)
    model = {"hidden": (6,), "latent_dim": 2}
    parts: dict[Any, dict[str, Any]] = {
        ModelConfig: model,
        ObjectiveConfig: {},
        OptimizerConfig: {},
    }
    for name, value in settings.items():
        parts[kind_of(name)][name] = value
    objective = build_objective(ObjectiveConfig(**parts[ObjectiveConfig]), 1000)
    optimizer = OptimizerConfig(**parts[OptimizerConfig])
    built = build_model(ModelConfig(**parts[ModelConfig]), data, 4)
    return (
        built.spec(),
        objective.spec,  # type: ignore[attr-defined]
        [float(learning_rate(optimizer, torch.tensor(step), 100, 4)) for step in range(100)],
        make_optimizer(optimizer, built).defaults,
    )


@pytest.mark.parametrize("setting", OWNERS)
def test_a_setting_is_read_by_its_owners_alone(setting: str) -> None:
    """What is refused would have changed nothing, and what is allowed changes something."""
    choice, readers = OWNERS[setting]
    for value in choices_of(choice):
        settings = {**NEEDS.get((choice, value), {}), choice: value}
        settings |= NEEDS.get((setting, CHANGED[setting]), {})
        if setting == "variance":
            settings["likelihood"] = value
        assert (made(**settings) != made(**settings, **{setting: CHANGED[setting]})) == (
            value in readers
        ), value


def test_every_setting_with_an_owner_is_tried() -> None:
    assert OWNERS.keys() == CHANGED.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_possible(name: str) -> None:
    assert why_impossible(preset(name)) is None
    assert why_unread(preset(name)) is None


SINGLE = [
    (setting, value)
    for kind in (ModelConfig, ObjectiveConfig, OptimizerConfig)
    for setting in get_type_hints(kind)
    if isinstance(getattr(kind(), setting), str)
    for value in choices_of(setting)
    if getattr(kind(), setting) != value
]


@pytest.mark.parametrize(("setting", "value"), SINGLE, ids=str)
def test_each_choice_is_possible(setting: str, value: Any) -> None:
    """With what it needs and nothing else."""
    choice, readers = OWNERS.get(setting, ("", ()))
    settings = {choice: readers[0]} if choice and value not in ("deterministic",) else {}
    settings |= NEEDS.get((setting, value), {})
    assert configured(**settings, **{setting: value})


def test_the_single_choices_are_all_there() -> None:
    assert {("posterior", "inverse-autoregressive"), ("variance", 0.2), ("optimizer", "adamw")} < {
        *SINGLE
    }
    assert len(SINGLE) > 25


def test_a_table_compiles_since_training_does_not_refine() -> None:
    assert configured(inference="table", refine_steps=7, refine_rate=0.1, compile="on")
    assert configured(inference="table", refine_rate=0.1)


# Every combination that is allowed trains: the loss is finite and every parameter has a gradient,
# without which several processes would wait for each other.

OBJECTIVES: list[dict[str, Any]] = [
    {"num_samples": 2},
    {"beta": 4.0, "kl_warmup_epochs": 1.0},
    {"free_bits": 0.1},
    {"capacity": 3.0},
    WEIGHTED,
    WEIGHTED | {"groups": 2, "elbo_share": 0.3, "gradient": "doubly-reparameterized"},
    WEIGHTED | {"groups": 2, "decoder_draws": "all"},
    {"objective": "total-correlation"},
    {"objective": "mmd"},
    {"objective": "mmd", "beta": 0.0},
]
LIKELIHOODS: list[dict[str, Any]] = [
    {"likelihood": "bernoulli"},
    {"likelihood": "gaussian"},
    {"likelihood": "gaussian", "variance": 0.1},
    {"likelihood": "gaussian", "variance": "optimal"},
    {"likelihood": "gaussian", "variance": "predicted"},
    {"likelihood": "categorical", "levels": 4},
    {"likelihood": "logistic-mixture", "mixtures": 2},
]
INFERENCES: list[dict[str, Any]] = [{}, {"inference": "table"}, {"refine_steps": 2}]
PRIORS: list[dict[str, Any]] = [
    {"prior": "standard-normal"},
    {"prior": "class-normal"},
    {"prior": "mixture", "prior_components": 3},
    {"prior": "vamp", "prior_components": 3},
    {"prior": "none"},
]


def possible() -> list[Config]:
    """All of them; each likelihood is tried with its share of the rest."""
    found = []
    posteriors = choices_of("posterior")
    rest = itertools.product(OBJECTIVES, posteriors, PRIORS, INFERENCES, [False, True])
    for number, (objective, posterior, prior, inference, conditional) in enumerate(rest):
        likelihood = LIKELIHOODS[number % len(LIKELIHOODS)]
        sizes = {"hidden": (6,), "activation": "tanh", "latent_dim": 2, "batch_size": 12}
        settings = objective | prior | inference | likelihood | sizes
        try:
            found.append(configured(posterior=posterior, conditional=conditional, **settings))
        except UserError:
            continue
    return found


def test_all_that_is_possible_trains() -> None:
    data, configs = grey_set(12, (1, 4, 3), classes=3), possible()
    assert len(configs) > 200
    batch = Batch(data.images, data.labels, torch.arange(12))
    for config in configs:
        torch.manual_seed(0)
        model, objective = (
            build_model(config.model, data, 12),
            build_objective(config.objective, 12),
        )
        step = TrainingStep(model, objective, 0)
        with torch.no_grad():
            for parameter in step.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        loss, sums = step(batch, torch.tensor(5))
        loss.backward()
        assert loss.isfinite(), config
        assert all(x.isfinite() for x in sums), config
        for name, parameter in step.named_parameters():
            assert parameter.grad is not None, (name, config)
            assert parameter.grad.isfinite().all(), (name, config)
            # The weights of a mixture are all that an MMD alone does not move.
            if not (name.endswith("prior.logits") and config.objective.beta == 0):
                assert parameter.grad.abs().sum() > 0, (name, config)


def test_rules_are_about_a_whole_configuration() -> None:
    """Each of these is possible alone."""
    config = Config(model=ModelConfig(posterior="deterministic"))
    assert Config(objective=ObjectiveConfig("importance-weighted", 4))
    with pytest.raises(UserError, match="--objective importance-weighted"):
        replace(config, objective=ObjectiveConfig("importance-weighted", 4))


def test_a_saved_setting_that_is_not_read_is_no_mistake() -> None:
    """It may be the default of an earlier version: the run must still open."""
    config = from_json('{"model": {"weight_std": 1.25, "levels": 7}}', "an old run")
    assert why_unread(config) is not None
    with pytest.raises(UserError, match="--levels belongs to --likelihood categorical"):
        train(config, name="new")
