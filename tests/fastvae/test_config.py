"""Settings: what is allowed, how they are written and read, and the presets made of them."""

import ast
import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_models import grey_set

import fastvae.config
import fastvae.data.config
from fastvae.build import build_model, build_objective
from fastvae.config import (
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    differences,
    from_json,
)
from fastvae.errors import UserError
from fastvae.presets import DEFAULT_PRESET, PRESETS, preset
from fastvae.training.loop import RESUMABLE

ODD = Config(
    data=DataConfig("some/where é", Path("data dir"), image_size=(12, 8), channels=3, holdout=0.25),
    model=ModelConfig(
        network="conv",
        hidden=(7,),
        widths=(3, 5, 9),
        activation="gelu",
        latent_dim=3,
        likelihood="gaussian",
        variance=0.02,
    ),
    objective=ObjectiveConfig(beta=0.5, kl_warmup_epochs=1.5),
    optimizer=OptimizerConfig("adamw", 0.1, 0.01, "step", 3, 2.5, 0.1, 1.0, 0.99),
    output=Path("runs/odd"),
    epochs=0.3,
    max_steps=17,
    seed=2**63 - 1,
    eval_every=math.inf,
    tracker="tensorboard",
)


@pytest.mark.parametrize("config", [Config(), ODD, *map(preset, PRESETS)])
def test_written_and_read(config: Config) -> None:
    assert from_json(config.to_json(), "here") == config


def test_what_is_left_out_takes_its_default() -> None:
    assert from_json("{}", "here") == Config()
    changed = from_json('{"model": {"latent_dim": 3}, "epochs": 2}', "here")
    assert changed == replace(Config(), model=ModelConfig(latent_dim=3), epochs=2.0)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"latent_dim": 3}', ["latent_dim"]),
        ('{"model": {"latent": 3}}', ["model.latent", "3"]),
        ('{"model": {"latent_dim": "many"}}', ["model.latent_dim", "integer", "'many'"]),
        ('{"model": {"latent_dim": "20"}}', ["model.latent_dim", "integer", "'20'"]),
        ('{"model": {"latent_dim": 2.5}}', ["model.latent_dim", "2.5"]),
        ('{"model": {"hidden": 400}}', ["model.hidden", "400"]),
        ('{"model": {"likelihood": "foo"}}', ["model.likelihood", "bernoulli", "gaussian", "foo"]),
        ('{"model": {"variance": "large"}}', ["model.variance", "learned", "large"]),
        ('{"seed": true}', ["seed", "True"]),
        ('{"epochs": null}', ["epochs"]),
        ('{"model": {"latent_dim": 0}}', ["--latent-dim must be at least 1, got 0"]),
        ('{"objective": {"beta": -1}}', ["--beta must be 0 or more, got -1"]),
        ('{"data": {"holdout": 1.5}}', ["--holdout", "1.5"]),
        ('{"data": {"channels": 2}}', ["data.channels", "1 or 3"]),
        ('{"seed": 1, "epochs": "x", "model": {"depth": 1}}', ["epochs", "model.depth"]),
        ('{"seed": 1', ["is not JSON"]),
        ("[1, 2]", ["object"]),
        ("", ["is not JSON"]),
    ],
)
def test_a_file_that_is_no_configuration(text: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        from_json(text, "some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("make", "fields", "parts"),
    [
        (ModelConfig, {"latent_dim": 0}, ["--latent-dim", "at least 1", "0"]),
        (ModelConfig, {"hidden": (4, 0)}, ["--hidden", "positive", "(4, 0)"]),
        (ModelConfig, {"widths": (-1,)}, ["--widths", "positive"]),
        (ModelConfig, {"network": "conv", "widths": ()}, ["--widths", "one or more"]),
        (ModelConfig, {"activation": "sine"}, ["--activation", "relu", "tanh", "sine"]),
        (ModelConfig, {"variance": 0.0}, ["--variance", "or a positive number", "0.0"]),
        (ModelConfig, {"variance": math.inf}, ["--variance"]),
        (
            ModelConfig,
            {"likelihood": "gaussian", "binarize": "dynamic"},
            ["--binarize", "auto or none", "--likelihood gaussian", "dynamic"],
        ),
        (ObjectiveConfig, {"beta": -1.0}, ["--beta", "0 or more", "-1"]),
        (ObjectiveConfig, {"beta": math.nan}, ["--beta"]),
        (ObjectiveConfig, {"kl_warmup_epochs": math.inf}, ["--kl-warmup-epochs", "inf"]),
        (OptimizerConfig, {"learning_rate": 0.0}, ["--learning-rate", "positive"]),
        (OptimizerConfig, {"weight_decay": -0.1}, ["--weight-decay", "0 or more"]),
        (OptimizerConfig, {"lr_warmup_steps": -1}, ["--lr-warmup-steps"]),
        (OptimizerConfig, {"lr_step_epochs": 0.0}, ["--lr-step-epochs"]),
        (OptimizerConfig, {"lr_step_factor": 1.5}, ["--lr-step-factor"]),
        (OptimizerConfig, {"clip_norm": -1.0}, ["--clip-norm"]),
        (OptimizerConfig, {"ema_decay": 1.0}, ["--ema-decay"]),
        (Config, {"batch_size": 0}, ["--batch-size", "at least 1"]),
        (Config, {"epochs": 0.0}, ["--epochs", "positive"]),
        (Config, {"epochs": math.inf}, ["--epochs", "inf"]),
        (Config, {"max_steps": 0}, ["--max-steps", "positive"]),
        (Config, {"gradient_accumulation_steps": 0}, ["--gradient-accumulation-steps"]),
        (Config, {"seed": -1}, ["--seed", "[0, 2^63)"]),
        (Config, {"log_every": 0}, ["--log-every"]),
        (Config, {"eval_every": 0.0}, ["--eval-every"]),
        (Config, {"checkpoint_every": -1.0}, ["--checkpoint-every"]),
        (DataConfig, {"image_size": (1, 2, 3)}, ["--image-size", "[1, 2, 3]"]),
        (DataConfig, {"holdout": 1.0}, ["--holdout", "between 0 and 1"]),
    ],
)
def test_impossible_values(make: Any, fields: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make(**fields)
    for part in parts:
        assert part in str(caught.value)


def test_binarisation_decided() -> None:
    assert ModelConfig().binarization == "dynamic"
    assert ModelConfig(binarize="static").binarization == "static"
    assert ModelConfig(binarize="none").binarization == "none"
    assert ModelConfig(likelihood="gaussian").binarization == "none"


def test_differences() -> None:
    assert differences(Config(), Config()) == {}
    other = replace(Config(), model=ModelConfig(latent_dim=3), epochs=2.0)
    assert differences(Config(), other) == {"model.latent_dim": (20, 3), "epochs": (10.0, 2.0)}


def test_every_field_says_what_it_is() -> None:
    """The texts of --help: a string below each field."""
    for module in (fastvae.config, fastvae.data.config):
        tree = ast.parse(Path(module.__file__ or "").read_text())
        for definition in ast.walk(tree):
            if not isinstance(definition, ast.ClassDef):
                continue
            body = definition.body
            for field, after in zip(body, [*body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign) and "Config" not in ast.unparse(field):
                    told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    assert told, ast.unparse(field)


def test_what_may_change_in_a_resumed_run_exists() -> None:
    names = set(differences_of_everything())
    assert names >= RESUMABLE
    assert not RESUMABLE & {"seed", "batch_size", "data.data", "data.holdout"}
    assert not any(name.startswith(("model.", "objective.", "optimizer.")) for name in RESUMABLE)


def differences_of_everything() -> list[str]:
    names = []
    for field in dataclasses.fields(Config):
        value = getattr(Config(), field.name)
        if dataclasses.is_dataclass(value):
            names += [f"{field.name}.{inner.name}" for inner in dataclasses.fields(value)]
        else:
            names.append(field.name)
    return names


# Presets


SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "fashion-mnist": (1, 28, 28)}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name: str) -> None:
    config = preset(name)
    if config.model.target == "labels":
        return  # tests of its own
    shape = SHAPES.get(config.data.data, (3, 32, 32))
    vae = build_model(config.model, grey_set(64, shape, classes=3), config.batch_size)
    assert vae.spec()["decoder"]["name"] == config.model.network
    assert (vae.image_shape, vae.latent_dim) == (shape, config.model.latent_dim)
    assert vae.likelihood.is_density
    if vae.prior.is_distribution:
        assert vae.sample(2, seed=0).shape == (2, *shape)
    objective = build_objective(config.objective, 1000)
    assert objective.num_samples == config.objective.num_samples


def test_the_default_needs_no_download() -> None:
    assert DEFAULT_PRESET in PRESETS
    assert preset(DEFAULT_PRESET).data.data == "digits"


def test_unknown_preset() -> None:
    with pytest.raises(UserError) as caught:
        preset("mnist-mpl")
    assert "'mnist-mpl'" in str(caught.value)
    assert "did you mean mnist-mlp?" in str(caught.value)
    assert all(name in str(caught.value) for name in PRESETS)
    with pytest.raises(UserError) as caught:
        preset("zzzz")
    assert "did you mean" not in str(caught.value)


def test_the_model_is_the_configured_one() -> None:
    config = replace(ODD.model, hidden=(7, 5))
    spec = build_model(config, grey_set(4, (3, 12, 8)), 2).spec()
    assert spec["encoder"] == {
        "name": "conv",
        "image_shape": (3, 12, 8),
        "outputs": 6,
        "widths": (3, 5, 9),
        "hidden": (7, 5),
        "activation": "gelu",
        "pooling": False,
        "condition_dim": 0,
    }
    assert spec["decoder"]["widths"] == (9, 5, 3)
    assert spec["decoder"]["hidden"] == (5, 7)
    assert spec["likelihood"] == {"name": "gaussian", "variance": 0.02}
    assert build_model(ModelConfig(), grey_set(4, (1, 4, 4)), 2).likelihood.binarize == "dynamic"


def test_the_warm_up_is_counted_in_samples() -> None:
    objective = build_objective(
        ObjectiveConfig(beta=2.0, kl_warmup_epochs=1.5), samples_per_epoch=1000
    )
    assert (objective.beta, objective.warmup_samples) == (2.0, 1500)


def test_json_is_readable_by_anything() -> None:
    assert json.loads(Config().to_json())["model"]["hidden"] == [400, 400]
