"""The checkpoint format: what plain PyTorch makes of it, and the example that stays readable."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import assert_same_tensors, kept, metrics, resume, train, training_state, weights
from safetensors.torch import load_file
from torch.nn.functional import linear

from fastvae import VAE, checkpoints
from fastvae.data import DataConfig, load_data
from fastvae.evaluation import evaluate
from fastvae.runs import read_config

EXAMPLE = Path(__file__).parent / "examples/format-1"
# How it was made. Its versions of everything are in its results.json.
FLAGS = shlex.split(
    "--data digits --hidden 8 --latent-dim 2 --batch-size 64 --max-steps 40 --log-every 10 "
    "--eval-every 1 --checkpoint-every 1 --keep 1 --ema-decay 0.9 --schedule constant --compile off"
)


def test_the_example_is_whole() -> None:
    checkpoint, problems = checkpoints.newest(EXAMPLE)
    assert checkpoint.step == 40 and problems == []
    assert json.loads((checkpoint.folder / "manifest.json").read_text())["format"] == 1


def test_the_example_is_the_model_it_was() -> None:
    vae = VAE.from_pretrained(EXAMPLE)
    _, heldout = load_data(DataConfig(), seed=0)
    found = evaluate(vae, heldout, seed=0).named()
    expected = json.loads((EXAMPLE / "results.json").read_text())["heldout"]
    assert found == pytest.approx(expected, rel=1e-5)
    assert vae.sample(3, seed=1).shape == (3, 1, 8, 8)


def test_the_example_goes_on(tmp_path: Path) -> None:
    """As a run that was never stopped."""
    run = resume(shutil.copytree(EXAMPLE, tmp_path / "run"), "--max-steps", 60)
    straight = train(*FLAGS, "--max-steps", 60, output=tmp_path / "straight")
    for name, tensor in training_state(straight).items():
        torch.testing.assert_close(training_state(run)[name], tensor, rtol=1e-3, atol=1e-5)
    expected = {line["step"]: line["loss"] for line in metrics(straight)}
    for line in metrics(run):
        if line["step"] in expected:
            assert line["loss"] == pytest.approx(expected[line["step"]], rel=1e-4)


def test_weights_in_plain_pytorch() -> None:
    """Read without fastvae, and used without it: the mean of q of an image."""
    state = load_file(kept(EXAMPLE) / "model.safetensors")
    assert not [name for name in state if "_orig_mod" in name or "module." in name]
    vae = VAE.from_pretrained(EXAMPLE)
    assert state.keys() == vae.state_dict().keys()
    _, heldout = load_data(DataConfig(), seed=0)
    x = heldout.tensor[:5]
    layers = [name.removesuffix(".weight") for name in state if name.startswith("encoder")]
    layers = [name for name in layers if f"{name}.bias" in state]
    h = (x.float() / 255).flatten(1)
    for i, name in enumerate(layers):
        h = linear(h, state[f"{name}.weight"], state[f"{name}.bias"])
        h = h.relu() if i < len(layers) - 1 else h
    torch.testing.assert_close(h[:, :2], vae.encode(x).mu, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_run_has_the_same_names(tmp_path: Path) -> None:
    compiled = train("--compile", "on", output=tmp_path / "compiled")
    plain = train(output=tmp_path / "plain")
    for read in (weights, training_state):
        assert read(compiled).keys() == read(plain).keys()


def test_the_flags_of_the_example(tmp_path: Path) -> None:
    """So that it can be made again: the settings are those, and younger ones at their defaults."""
    run = train(*FLAGS, output=tmp_path / "run")
    found, stored = (replace(read_config(r), output=None) for r in (run, EXAMPLE))
    assert found == stored
    if json.loads((EXAMPLE / "results.json").read_text())["versions"]["torch"] == torch.__version__:
        assert_same_tensors(weights(run), weights(EXAMPLE))
