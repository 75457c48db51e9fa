"""The loops that people write: the usual script, Accelerate's example, compiled by hand.

Each trains for ever on `pixels` `[N, 1, 28, 28]` uint8 and calls `beat` after every step.
"""

import runpy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peers_cases import LATENTS, LEARNING_RATE, Case, PlainVAE, loss_of
from peers_limit import products
from settings import ROOT
from torch import Tensor
from torch.utils.data import DataLoader

Beat = Any
"""`peers_worker.Beat`"""

STEPS_BETWEEN_LOOKS = 200
"""How often a loop without `.item()` looks at its loss after all, to see that it learns."""


def loader_of(pixels: Tensor, batch: int, variant: str) -> DataLoader:
    """torchvision's MNIST with other images: each becomes a PIL image and then, by ToTensor, a
    float32 tensor again."""
    from torchvision.datasets import MNIST
    from torchvision.transforms import ToTensor

    class Images(MNIST):
        def __init__(self) -> None:
            self.data = pixels[:, 0]
            self.targets = torch.zeros(len(pixels), dtype=torch.int64)
            self.transform, self.target_transform = ToTensor(), None

    return DataLoader(Images(), batch_size=batch, shuffle=True, num_workers=int(variant[0]))


def script(case: Case, variant: str, pixels: Tensor, beat: Beat) -> None:
    """As tutorials have it: eager, a DataLoader, the loss read at every step."""
    loader = loader_of(pixels, case.batch, variant)
    vae = PlainVAE(case.model)
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE)
    vae.train()
    beat.start()
    while True:
        total = 0.0
        for x, _ in loader:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16"):
                loss = loss_of(x, *vae(x))
            loss.backward()
            total += (value := loss.item())
            optimizer.step()
            beat(len(x), value)


def accelerate(case: Case, variant: str, pixels: Tensor, beat: Beat) -> None:
    """As the examples of Accelerate have it."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=case.precision, cpu=True)
    vae = PlainVAE(case.model)
    model, optimizer, loader = accelerator.prepare(
        vae,
        torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE),
        loader_of(pixels, case.batch, variant),
    )
    model.train()
    beat.start()
    steps = 0
    while True:
        total = torch.zeros(())
        for x, _ in loader:
            with accelerator.autocast():
                loss = loss_of(x, *model(x))
            total += loss.detach().float()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            beat(len(x), loss.item() if steps % STEPS_BETWEEN_LOOKS == 0 else None)


def hand_written(case: Case, variant: str, pixels: Tensor, beat: Beat) -> None:
    """PyTorch at its best: bytes in memory, noise from outside of the graph, everything between
    compiled, fused Adam, no `.item()`; the backward pass in a graph of its own or in the same,
    the channels of convolutions first or (in two graphs) last."""
    torch.set_float32_matmul_precision("medium")
    vae = PlainVAE(case.model)
    if variant == "channels-last":
        vae = vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, fused=True)
    step = (_one_graph if variant == "one-graph" else _two_graphs)(vae, optimizer, case)
    beat.start()
    for steps, x in enumerate(_batches(pixels, case.batch), 1):
        loss = step(x, torch.randn(case.batch, LATENTS[case.model]))
        look = steps % STEPS_BETWEEN_LOOKS == 0
        beat(case.batch, loss.item() if look else None)


def hand_written_allocator(case: Case, variant: str, pixels: Tensor, beat: Beat) -> None:
    """The same, with what fastvae tells the C library about freed memory."""
    runpy.run_path(str(ROOT / "fastvae/allocator.py"))["keep_freed_memory"]()
    hand_written(case, variant, pixels, beat)


def limit(case: Case, variant: str, pixels: Tensor, beat: Beat) -> None:
    """No loop at all: the matrix products of a step."""
    torch.set_float32_matmul_precision("medium")
    calls = products(case, variant)
    beat.start()
    while True:
        for call in calls:
            call()
        beat(case.batch)


LOOPS: dict[str, Callable[[Case, str, Tensor, Beat], None]] = {
    "script": script,
    "accelerate": accelerate,
    "hand-written": hand_written,
    "hand-written-allocator": hand_written_allocator,
    "limit": limit,
}


# ------------------------------------------------------------------------ compiled by hand

Step = Callable[[Tensor, Tensor], Tensor]
"""Bytes and noise in, the loss out, the weights moved."""


def _batches(pixels: Tensor, batch: int) -> Iterator[Tensor]:
    """Full batches of bytes, in a new order each time through."""
    while True:
        order = torch.randperm(len(pixels))
        for first in range(0, len(pixels) - batch + 1, batch):
            yield pixels.index_select(0, order[first : first + batch])


def _loss(vae: Callable[..., Any], case: Case, x: Tensor, noise: Tensor) -> Tensor:
    x = x.float() / 255
    with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16"):
        return loss_of(x, *vae(x, noise))


def _two_graphs(vae: PlainVAE, optimizer: torch.optim.Optimizer, case: Case) -> Step:
    """Autograd between a compiled forward and a compiled backward pass."""
    compiled = torch.compile(
        lambda x, noise: _loss(vae, case, x, noise), fullgraph=True, dynamic=False
    )

    def step(x: Tensor, noise: Tensor) -> Tensor:
        loss = compiled(x, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _one_graph(vae: PlainVAE, optimizer: torch.optim.Optimizer, case: Case) -> Step:
    """Loss and gradients as one function, compiled as one."""
    weights = dict(vae.named_parameters())
    shared = {name: weight.detach() for name, weight in weights.items()}

    def loss_of_weights(values: dict[str, Tensor], x: Tensor, noise: Tensor) -> Tensor:
        return _loss(lambda *args: torch.func.functional_call(vae, values, args), case, x, noise)

    compiled = torch.compile(
        torch.func.grad_and_value(loss_of_weights), fullgraph=True, dynamic=False
    )

    def step(x: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            gradients, loss = compiled(shared, x, noise)
        for name, weight in weights.items():
            weight.grad = gradients[name]
        optimizer.step()
        return loss

    return step
