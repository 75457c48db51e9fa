"""The model: its terms against torch.distributions and integrals, its shapes, its files."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fastvae_kernels import normal, uniform
from safetensors.torch import load_file
from small_models import grey_images, make_vae, rough
from torch import Tensor, distributions, nn

import fastvae
from fastvae import VAE, Bernoulli, Gaussian, MLPDecoder, MLPEncoder
from fastvae.errors import UserError
from fastvae.noise import (
    FLIP,
    LATENT,
    LIKELIHOOD,
    MATCH,
    OBSERVE,
    PRIOR,
    REFINE,
    WEIGHTS,
    all_streams,
    stream,
)
from fastvae.parts.likelihoods import Likelihood
from fastvae.parts.networks import ImageShape

SHAPES: list[ImageShape] = [(1, 28, 28), (3, 32, 32), (3, 33, 47), (1, 8, 8), (1, 1, 1), (2, 5, 1)]


# Shapes


@pytest.mark.parametrize("image_shape", SHAPES, ids=str)
@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize("likelihood", [Bernoulli, Gaussian])
def test_every_image_size(network: str, image_shape: ImageShape, likelihood: Any) -> None:
    vae = make_vae(network, image_shape, likelihood())
    x = grey_images(3, image_shape)
    terms = vae(x, 7, 0)
    assert terms.kl.shape == vae.elbo(x).shape == (3,)
    assert terms.nll.shape == (1, 3)
    assert torch.equal(terms.elbo, -(terms.nll[0] + terms.kl))
    assert (terms.kl >= 0).all()
    terms.elbo.sum().backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    q = vae.encode(x)
    assert q.mu.shape == q.logvar.shape == (3, 5)
    assert torch.allclose(q.std, q.logvar.exp().sqrt())
    assert vae.decode(q.mu).shape == vae.reconstruct(x).shape == x.shape
    assert torch.equal(vae.decode(q.mu), vae.reconstruct(x))
    assert vae.sample(2, seed=0).shape == (2, *image_shape)


def test_a_module_pair_of_the_users_own() -> None:
    """Networks that have nothing from this library in them."""

    class Upsample(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 12)

        def forward(self, z: Tensor) -> Tensor:
            small = self.linear(z).view(-1, 3, 2, 2)
            return nn.functional.interpolate(small, (4, 6))

    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(6))
    vae = VAE(encoder, Upsample(), Gaussian(0.3), image_shape=(3, 4, 6), latent_dim=3)
    x = grey_images(4, (3, 4, 6))
    assert vae.elbo(x).shape == (4,)
    assert vae.sample(2, seed=1).shape == (2, 3, 4, 6)


def small(encoder_outputs: int = 4, decoder: nn.Module | None = None) -> VAE:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(9, encoder_outputs))
    decoder = decoder or nn.Sequential(nn.Linear(2, 9), nn.Unflatten(1, (1, 3, 3)))
    return VAE(encoder, decoder, Bernoulli(), image_shape=(1, 3, 3), latent_dim=2)


def test_wrong_shapes_are_named_beside_the_needed_ones() -> None:
    x = grey_images(5, (1, 3, 3))
    with pytest.raises(UserError, match=r"encoder returned \(5, 3\).*latent_dim=2 needs \(5, 4\)"):
        small(encoder_outputs=3)(x, 0)
    flat = nn.Linear(2, 9)
    with pytest.raises(UserError, match=r"decoder returned \(5, 9\).*needs \(5, 1, 3, 3\)"):
        small(decoder=flat)(x, 0)
    with pytest.raises(UserError, match=r"decoder returned \(2, 9\)"):
        small(decoder=flat).sample(2)
    vae = small()
    for wrong in (grey_images(5, (1, 3, 4)), grey_images(5, (3, 3, 3)), x[0]):
        for use in (vae.elbo, vae.encode, vae.reconstruct):
            with pytest.raises(UserError) as caught:
                use(wrong)
            assert str(tuple(wrong.shape)) in str(caught.value)
            assert "('N', 1, 3, 3)" in str(caught.value)
    with pytest.raises(UserError, match=r"\(N, 2\).*got \(4, 3\)"):
        vae.decode(torch.zeros(4, 3))
    with pytest.raises(UserError, match="at least one image, got 0"):
        vae.sample(0)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Bernoulli("none"), Gaussian()], ids=repr)
def test_pixels_of_an_unknown_scale(likelihood: Likelihood) -> None:
    """0 to 255 in another type than uint8 would silently be read as 0 to 1."""
    vae, x = make_vae(likelihood=likelihood), grey_images(2, (1, 8, 8))
    for use in (vae.elbo, vae.encode, vae.reconstruct):
        with pytest.raises(UserError, match=r"uint8, bool, or floating .* got torch\.int64"):
            use(x.long())
    white = x > 127
    for alike in (white.float(), white.double(), white.to(torch.uint8) * 255):
        assert torch.equal(vae.elbo(alike), vae.elbo(white))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_shape": (28, 28), "latent_dim": 2}, r"channels, height, width\), got \(28, 28\)"),
        ({"image_shape": (1, 0, 28), "latent_dim": 2}, r"got \(1, 0, 28\)"),
        ({"image_shape": (1, 3, 3), "latent_dim": 0}, "latent_dim is at least 1, got 0"),
    ],
)
def test_impossible_sizes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VAE(nn.Identity(), nn.Identity(), Bernoulli(), **arguments)


# The terms of the bound, against independent computations


@pytest.mark.parametrize("seed", [0, 2**62 + 12345])
@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("kind", ["dynamic", "static", "gaussian"])
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_terms_against_torch_distributions(network: str, kind: str, offset: int, seed: int) -> None:
    """In float64, with the same noise: which draws are made is part of what is promised."""
    likelihood = Gaussian(0.2) if kind == "gaussian" else Bernoulli(kind)  # type: ignore[arg-type]
    vae = rough(make_vae(network, (1, 7, 5), likelihood))
    x = grey_images(6, (1, 7, 5))
    if kind == "static":
        x = (x > 127).to(torch.uint8) * 255
    terms = vae(x, seed, offset)

    exact = make_vae(network, (1, 7, 5), copy.deepcopy(likelihood)).double()
    exact.load_state_dict({k: v.double() for k, v in vae.state_dict().items()})
    grey = x.double() / 255
    if kind == "dynamic":
        draws = uniform((6, 1, 7, 5), seed ^ OBSERVE, offset=offset).double()
        values = (draws < grey).double()
        assert 0.2 < values.mean() < 0.8
    else:
        values = grey
    mu, logvar = exact.encoder(values).chunk(2, dim=1)
    q = distributions.Normal(mu, (logvar / 2).exp())
    z = mu + q.scale * normal((6, 5), seed ^ LATENT, offset=offset).double()
    prior = distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    kl = distributions.kl_divergence(q, prior).sum(1)
    parameters = exact.decoder(z)
    if kind == "gaussian":
        p: distributions.Distribution = distributions.Normal(parameters, math.sqrt(0.2))
    else:
        p = distributions.Bernoulli(logits=parameters)
    nll = -p.log_prob(values).flatten(1).sum(1)

    assert kl.min() > 0.1
    assert nll.min() > 1
    torch.testing.assert_close(terms.kl.double(), kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms.nll[0].double(), nll, rtol=1e-5, atol=1e-4)
    assert torch.equal(vae.elbo(x, seed=seed, offset=offset), terms.elbo)


def test_seed_and_offset_may_be_tensors() -> None:
    vae, x = make_vae(), grey_images(4, (1, 8, 8))
    given = vae(x, torch.tensor(9), torch.tensor(50))
    assert torch.equal(given.elbo, vae(x, 9, 50).elbo)
    assert not torch.equal(given.elbo, vae(x, 8, 50).elbo)
    assert not torch.equal(given.elbo, vae(x, 9, 51).elbo)


def test_each_row_meets_the_noise_of_its_own_position() -> None:
    """So any cut of a batch among processes gives the same terms."""
    vae, x = make_vae(), grey_images(6, (1, 8, 8))
    whole = vae(x, 3, 100)
    parts = [vae(x[:2], 3, 100), vae(x[2:5], 3, 102), vae(x[5:], 3, 105)]
    for name in ("nll", "kl"):
        pieces = torch.cat([getattr(part, name) for part in parts], dim=-1)
        torch.testing.assert_close(pieces, getattr(whole, name), rtol=1e-5, atol=1e-5)


def test_the_bound_falls_short_by_the_divergence_from_the_true_posterior() -> None:
    """log p(x) − E[ELBO] = KL(q ‖ p(z | x)), both integrated over a grid in float64."""
    vae = rough(make_vae("mlp", (1, 2, 2), Bernoulli(), latent_dim=1))
    x = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0]], dtype=torch.uint8).view(2, 1, 2, 2) * 255

    z = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    dz = (z[1] - z[0]).item()
    with torch.no_grad():
        logits = vae.decoder(z.float()[:, None]).double()
        mu, logvar = (s.double() for s in vae.encoder(x / 255).chunk(2, dim=1))
        draws = 40000
        repeated = x.repeat_interleave(draws, 0)
        elbos = vae.elbo(repeated, seed=5).double().view(2, draws)
    log_prior = distributions.Normal(0.0, 1.0).log_prob(z)
    for i in range(2):
        log_joint = log_prior + distributions.Bernoulli(logits=logits).log_prob(
            (x[i] / 255).double()
        ).flatten(1).sum(1)
        log_p = torch.logsumexp(log_joint, 0) + math.log(dz)
        log_q = distributions.Normal(mu[i], (logvar[i] / 2).exp()).log_prob(z)
        gap = ((log_q - (log_joint - log_p)) * log_q.exp()).sum() * dz
        assert gap > 0.05
        spread = elbos[i].std().item() / math.sqrt(draws)
        assert abs((log_p - gap - elbos[i].mean()).item()) < 5 * spread + 1e-4
        assert elbos[i].mean() < log_p


# Sampling


def test_samples_do_not_depend_on_their_number() -> None:
    vae = rough(make_vae("conv", (3, 9, 7)))
    for noisy in (False, True):
        many = vae.sample(40, seed=11, noise=noisy)
        few = vae.sample(3, seed=11, noise=noisy)
        torch.testing.assert_close(few, many[:3], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(many[0], many[1], atol=1e-3)


def test_samples_are_what_the_seed_says() -> None:
    vae = rough(make_vae("mlp", (1, 8, 8)))
    z = normal((4, 5), 11 ^ PRIOR)
    probability = torch.sigmoid(vae.decoder(z))
    assert torch.equal(vae.sample(4, seed=11), probability)
    draws = uniform((4, 1, 8, 8), 11 ^ LIKELIHOOD)
    assert torch.equal(vae.sample(4, seed=11, noise=True), (draws < probability).float())

    gaussian = rough(make_vae("mlp", (1, 8, 8), Gaussian(0.25)))
    mean = gaussian.sample(4, seed=11)
    assert torch.equal(mean, gaussian.decoder(z))
    noisy = gaussian.sample(4, seed=11, noise=True)
    expected = mean + gaussian.likelihood.logvar.exp().sqrt() * normal(
        (4, 1, 8, 8), 11 ^ LIKELIHOOD
    )
    torch.testing.assert_close(noisy, expected)


def test_sampling_without_a_seed() -> None:
    vae = make_vae()
    one = vae.sample(2, generator=torch.Generator().manual_seed(4))
    same = vae.sample(2, generator=torch.Generator().manual_seed(4))
    other = vae.sample(2, generator=torch.Generator().manual_seed(5))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    torch.manual_seed(0)
    first, second = vae.sample(2), vae.sample(2)
    torch.manual_seed(0)
    assert torch.equal(first, vae.sample(2))
    assert not torch.equal(first, second)
    assert not first.requires_grad


def test_a_seed_out_of_range() -> None:
    for seed in (2**63, -(2**63) - 1, 10**20):
        with pytest.raises(UserError, match=f"got {seed}"):
            make_vae().sample(1, seed=seed)
    assert make_vae().sample(1, seed=2**63 - 1).shape == make_vae().sample(1, seed=-1).shape


def test_streams_are_far_apart() -> None:
    purposes = (LATENT, OBSERVE, PRIOR, LIKELIHOOD)
    seeds = {stream(seed, purpose) for seed in range(1000) for purpose in purposes}
    assert len(seeds) == 4000
    draws = torch.stack([normal((4000,), stream(3, purpose)) for purpose in purposes])
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 5 / math.sqrt(4000)


def test_streams_made_once_are_the_same() -> None:
    for seed in (0, 3, 2**63 - 1, -(2**63)):
        for purpose in (LATENT, OBSERVE, MATCH, REFINE, WEIGHTS, FLIP):
            found = stream(all_streams(seed), purpose)
            assert int(found) == stream(seed, purpose) == int(stream(torch.tensor(seed), purpose))
        assert int(stream(all_streams(seed), 0x1234)) == stream(seed, 0x1234)  # a user's own


# Compiled


@pytest.mark.slow
@pytest.mark.parametrize(("network", "likelihood"), [("mlp", Bernoulli()), ("conv", Gaussian())])
def test_compiled_as_one_graph(network: str, likelihood: Likelihood) -> None:
    vae = rough(make_vae(network, (1, 8, 8), likelihood))
    x = grey_images(6, (1, 8, 8))
    seed, offset = torch.tensor(3), torch.tensor(10)
    compiled = torch.compile(vae, fullgraph=True, dynamic=False)

    def terms_and_gradients(model: Any) -> list[Tensor]:
        vae.zero_grad()
        terms = model(x, seed, offset)
        terms.elbo.mean().backward()
        gradients = [p.grad.clone() for p in vae.parameters() if p.grad is not None]
        return [terms.nll, terms.kl, *gradients]

    eager, fused = terms_and_gradients(vae), terms_and_gradients(compiled)
    assert len(eager) == 2 + len(list(vae.parameters()))
    for a, b in zip(eager, fused, strict=True):
        assert (a - b).norm() < 1e-5 * a.norm()
    # Other noise, and nothing is compiled again.
    with torch.compiler.set_stance("fail_on_recompile"):
        again = compiled(x, torch.tensor(4), torch.tensor(11))
    torch.testing.assert_close(again.elbo, vae(x, 4, 11).elbo, rtol=1e-4, atol=1e-3)


# Saving and loading


@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize(
    "likelihood",
    [Bernoulli(), Bernoulli("none"), Gaussian(), Gaussian(0.37)],
    ids=["dynamic", "none", "learned", "fixed"],
)
def test_saved_and_loaded(tmp_path: Path, network: str, likelihood: Likelihood) -> None:
    vae = make_vae(network, (3, 6, 5), likelihood)
    vae.save_pretrained(tmp_path / "model")
    loaded = VAE.from_pretrained(tmp_path / "model")
    assert not loaded.training
    written = json.loads((tmp_path / "model/config.json").read_text())
    assert loaded.spec() == vae.spec()
    assert written == json.loads(json.dumps(vae.spec()))
    state, again = vae.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    x = grey_images(3, (3, 6, 5))
    assert torch.equal(vae.elbo(x, seed=1), loaded.elbo(x, seed=1))
    assert torch.equal(vae.sample(2, seed=1), loaded.sample(2, seed=1))
    parameters = {name for name, _ in vae.named_parameters()}
    assert parameters == {name for name, _ in loaded.named_parameters()}


def test_the_file_holds_plain_names(tmp_path: Path) -> None:
    vae = make_vae()
    torch.compile(vae).save_pretrained(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == vae.state_dict().keys()
    assert not any(name.startswith(("_orig_mod.", "module.")) for name in found)
    kinds = {path.suffix for path in tmp_path.iterdir()}
    assert kinds <= {".json", ".safetensors", ".md"}
    assert "library_name: fastvae" in (tmp_path / "README.md").read_text()


def test_saving_again_replaces(tmp_path: Path) -> None:
    make_vae("mlp").save_pretrained(tmp_path)
    vae = make_vae("conv", (3, 6, 5))
    vae.save_pretrained(tmp_path)
    assert VAE.from_pretrained(tmp_path).spec() == vae.spec()


class MyEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


def test_custom_modules_are_handed_back_by_keyword(tmp_path: Path) -> None:
    torch.manual_seed(0)
    decoder = MLPDecoder((1, 3, 3), 2, hidden=(4,))
    vae = VAE(MyEncoder(), decoder, Bernoulli(), image_shape=(1, 3, 3), latent_dim=2)
    vae.save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        VAE.from_pretrained(tmp_path)
    for part in ("encoder", "MyEncoder", "VAE.from_pretrained(..., encoder=your_module)"):
        assert part in str(caught.value)
    loaded = VAE.from_pretrained(tmp_path, encoder=MyEncoder())
    x = grey_images(2, (1, 3, 3))
    assert torch.equal(loaded.elbo(x), vae.elbo(x))
    with pytest.raises(UserError, match=r"model\.safetensors holds the weights of another model"):
        VAE.from_pretrained(tmp_path, encoder=nn.Sequential(nn.Flatten(), nn.Linear(9, 4)))


class Doubled(MLPEncoder):
    """Has the weights of a library's part and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_subclass_of_a_part_is_not_mistaken_for_it(tmp_path: Path) -> None:
    encoder = Doubled((1, 3, 3), 4, hidden=(4,))
    decoder = MLPDecoder((1, 3, 3), 2, hidden=(4,))
    vae = VAE(encoder, decoder, Bernoulli(), image_shape=(1, 3, 3), latent_dim=2)
    vae.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="Doubled"):
        VAE.from_pretrained(tmp_path)
    loaded = VAE.from_pretrained(tmp_path, encoder=Doubled((1, 3, 3), 4, hidden=(4,)))
    x = grey_images(2, (1, 3, 3))
    assert torch.equal(loaded.encode(x).mu, vae.encode(x).mu)


@pytest.mark.parametrize(
    "name", ["nowhere", "nowhere/at/all", "/nowhere/at/all", "{existing}/mistyped", "with space/x"]
)
def test_a_folder_that_is_not_there(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answered at once, without asking the Hub."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    name = name.format(existing="runs")
    with pytest.raises(UserError) as caught:
        VAE.from_pretrained(name)
    assert f"there is no folder {name}" in str(caught.value)
    assert "owner/name" in str(caught.value)


def test_a_name_that_is_not_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        VAE.from_pretrained("someone/something", local_files_only=True, cache_dir=tmp_path)
    message = str(caught.value)
    assert "someone/something" in message
    assert "no such folder" in message
    assert "Hub" in message
    assert "\n" not in message


def test_a_model_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's answers come from a folder here."""
    vae = make_vae()
    vae.save_pretrained(tmp_path)
    asked = []

    def download(repo_id: str, filename: str, **options: Any) -> str:
        asked.append((repo_id, filename, options["revision"]))
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    monkeypatch.setattr("fastvae.saving.hf_hub_download", download)
    loaded = VAE.from_pretrained("someone/faces", revision="v1")
    assert torch.equal(loaded.sample(1, seed=0), vae.sample(1, seed=0))
    assert ("someone/faces", "model.safetensors", "v1") in asked
    assert "push_to_hub" not in vars(VAE)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        VAE.from_pretrained(tmp_path)
    for part in (str(tmp_path), "model.safetensors", "config.json", "checkpoints/"):
        assert part in str(caught.value)


def test_damaged_files(tmp_path: Path) -> None:
    make_vae().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\x80\x04]."):
        file.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            VAE.from_pretrained(tmp_path)
        assert f"{file} is damaged" in str(caught.value)
    file.write_bytes(content)
    (tmp_path / "config.json").write_text('{"image_shape": [1, ')
    with pytest.raises(UserError, match=r"config\.json of .* is damaged"):
        VAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec.pop("decoder"), "lacks decoder"),
        (lambda spec: spec["encoder"].update(name="resnet"), "no encoder is called 'resnet'.*mlp"),
        (lambda spec: spec["encoder"].update(depth=3), "encoder 'mlp':.*depth"),
        (lambda spec: spec["likelihood"].update(binarize="odd"), "got 'odd'"),
    ],
)
def test_a_config_of_another_kind(tmp_path: Path, change: Any, message: str) -> None:
    make_vae().save_pretrained(tmp_path)
    spec = json.loads((tmp_path / "config.json").read_text())
    change(spec)
    (tmp_path / "config.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=message):
        VAE.from_pretrained(tmp_path)


def test_a_built_model_is_the_one_described() -> None:
    spec = make_vae("conv", (3, 6, 5), Gaussian(0.5)).spec()
    assert fastvae.build_vae(spec).spec() == spec
