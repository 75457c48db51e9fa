"""Images in the order of memory that convolutions use: the same values, everywhere."""

import torch
from fastvae_kernels.layout import is_channels_last
from torch._subclasses import FakeTensorMode

from fastvae.batch import Batch
from fastvae.build import build_model
from fastvae.config import ModelConfig
from fastvae.data import ImageSet
from fastvae.hardware import image_format
from fastvae.parts.likelihoods import Bernoulli, Gaussian
from fastvae.training.feed import Feed
from fastvae.training.step import mirrored

CPU, LAST = torch.device("cpu"), torch.channels_last
IMAGES = torch.randint(0, 256, (40, 3, 8, 10), dtype=torch.uint8)
SEED, OFFSET = torch.tensor(3), torch.tensor(5)


def conv():
    config = ModelConfig(network="conv", widths=(8, 16), hidden=(16,), latent_dim=4)
    return build_model(config, ImageSet(IMAGES, None, "noise"), 8)


def feed(memory_format):
    return Feed(ImageSet(IMAGES, None, "noise"), 7, CPU, 16, memory_format=memory_format)


def test_of_a_model():
    """Only what is copied to another device is laid anew on the way."""
    model = conv().to(memory_format=LAST)
    assert image_format(model) == torch.preserve_format
    with FakeTensorMode():
        convolution = torch.nn.Conv2d(3, 8, 3, device="cuda")
        assert image_format(convolution) == torch.preserve_format
        convolution.weight = torch.nn.Parameter(convolution.weight.contiguous(memory_format=LAST))
        assert image_format(convolution) == LAST
        assert image_format(torch.nn.Linear(3, 8, device="cuda")) == torch.preserve_format


def test_batches_are_the_same_in_either_order():
    last, plain = feed(LAST), feed(torch.contiguous_format)
    for one in (last, plain):
        one.prepare(0, 16)
    position = torch.tensor(4)
    a, b = (one.batch(position, 8).x for one in (last, plain))
    assert is_channels_last(a) and b.is_contiguous()
    assert torch.equal(a, b)
    a, b = (one.copied_batch(4, 8).x for one in (last, plain))
    assert is_channels_last(a) and b.is_contiguous()
    assert torch.equal(a, b)
    assert is_channels_last(mirrored(a, SEED, OFFSET))


def test_a_set_is_laid_anew_in_parts():
    images = ImageSet(torch.randint(0, 256, (2500, 3, 2, 5), dtype=torch.uint8), None, "noise")
    assert is_channels_last(images.to(CPU, LAST).tensor)
    assert torch.equal(images.to(CPU, LAST).tensor, images.tensor)
    assert images.to(CPU).tensor is images.tensor


def test_what_a_likelihood_observes():
    last = IMAGES.to(memory_format=LAST)
    chosen = torch.tensor([3, 0, 39, 3])
    for likelihood in (Bernoulli(), Gaussian()):
        got = likelihood.observe(last, SEED, OFFSET, chosen)
        assert is_channels_last(got)
        assert torch.equal(got, likelihood.observe(IMAGES, SEED, OFFSET, chosen))


def test_terms_and_gradients():
    """A network whose weights lie so answers so; what comes of it is the same."""
    found = []
    for memory_format in (LAST, torch.contiguous_format):
        torch.manual_seed(0)
        model = conv().to(memory_format=memory_format)
        data = IMAGES.to(memory_format=memory_format)
        batch = Batch(data, chosen=torch.tensor([3, 0, 39, 3]))
        terms = model(batch, SEED, OFFSET, 1)
        loss = terms.nll.mean() + terms.kl.mean()
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
