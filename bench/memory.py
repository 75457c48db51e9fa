"""What a step keeps for its backward pass, and its peak: with the kernels no noise is among it.

Kept are the tensors that autograd saves, but for inputs, parameters and outputs, which are there
anyway. On a GPU also the peak of allocated memory over a step, less what was held before it. On a
CPU fastvae runs its reference, which plain autograd differentiates and which keeps the noise.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from measure import synchronize
from op_cases import OPS, Tensors, leaves
from settings import Found, Settings, each
from step_cases import StepCase, digit_like_images, make_accelerator, make_updates
from step_rivals import OnDevice, plain_like
from torch import Tensor, nn

LATENTS = (1024, 64, 65536, 8192)
QUICK_LATENTS = (64,)
ROWS = 128
OPERATORS = ("reparameterize_kl", "reparameterize_kl_packed")


@dataclass(frozen=True)
class MemoryCase:
    """An operator alone, or "step", the whole step of the preset `mnist-mlp`."""

    what: str
    latents: int

    def __str__(self) -> str:
        return f"{self.what} at {self.latents} latents"


def run(settings: Settings) -> Iterator[Found]:
    """Measure the operators alone and the whole step, float32."""
    cases = [
        MemoryCase(what, latents)
        for latents in (QUICK_LATENTS if settings.quick else LATENTS)
        for what in (*OPERATORS, "step")
    ]
    for kind, value in each(cases, partial(_measure, settings=settings), settings):
        yield kind, value
        if kind == "row" and value["what"] != "step" and settings.device.type == "cuda":
            kept = value["kept"]["fastvae"]
            if kept >= ROWS * value["latents"]:
                yield "failure", f"{value['what']}: {kept} bytes kept: is it the noise?"


def _measure(case: MemoryCase, settings: Settings) -> Iterator[dict[str, Any]]:
    torch._dynamo.reset()
    measure = _step if case.what == "step" else _operator
    found = measure(case.what, case.latents, settings.device)
    yield {"what": case.what, "rows": ROWS, "latents": case.latents, **found}


def _operator(name: str, latents: int, device: torch.device) -> dict[str, Any]:
    op = next(op for op in OPS if op.name == name)
    inputs = op.make(ROWS, latents, torch.float32, device)
    computes: dict[str, Callable[..., Tensors]] = {
        "pytorch": op.pytorch,
        "compiled": torch.compile(op.pytorch, fullgraph=True, dynamic=False),
        "fastvae": op.fastvae,
    }
    kept: dict[str, int | None] = {}
    peak = {}
    for rival, compute in computes.items():

        def forward(compute: Callable[..., Tensors] = compute) -> Tensors:
            return compute(*inputs)

        def step(forward: Callable[[], Tensors] = forward) -> None:
            outputs = forward()
            gradients = [torch.ones_like(y) for y in outputs]
            torch.autograd.grad(outputs, leaves(inputs), gradients)

        step()  # whatever compiles has compiled
        kept[rival] = kept_bytes(forward, inputs)
        peak[rival] = peak_bytes(step, device)
    return {"kept": kept, "peak": peak}


def _step(what: str, latents: int, device: torch.device) -> dict[str, Any]:
    """Loss and gradients of the MLP; without the optimizer, whose memory is the same for all."""
    case = StepCase("mnist-mlp", ROWS)
    config = replace(case.config, model=replace(case.config.model, latent_dim=latents))
    images = digit_like_images(1000, device)
    accelerator = make_accelerator(config, device)
    position = torch.zeros((), dtype=torch.int64, device=device)

    eager = make_updates(config, images, accelerator, compiled=False, replayed=False)
    eager.feed.prepare(0, ROWS)
    fed = _kept_and_peak(lambda: eager.wrapped(position, ROWS)[0], eager.model, images)

    plain = OnDevice(plain_like(eager.model, config.model, case.image_shape), images, config)
    indices = torch.arange(ROWS, device=device)
    by_hand = _kept_and_peak(lambda: plain(indices), plain.vae, images)
    plain.compile(fullgraph=True, dynamic=False)
    compiled = _kept_and_peak(lambda: plain(indices), plain.vae, images)
    found = {"pytorch": by_hand, "compiled": compiled, "fastvae": fed}

    fast = make_updates(config, images, accelerator, compiled=True, replayed=False)
    fast.feed.prepare(0, ROWS)
    if gradients := fast.gradients:  # forward and backward are one: nothing is kept between them
        gradients(position)
        found["fastvae-compiled"] = (None, peak_bytes(lambda: gradients(position), device))
    return {
        "kept": {name: kept for name, (kept, _) in found.items()},
        "peak": {name: peak for name, (_, peak) in found.items()},
    }


def _kept_and_peak(
    loss: Callable[[], Tensor], model: nn.Module, images: Tensor
) -> tuple[int | None, int | None]:
    weights = list(model.parameters())

    def step() -> None:
        torch.autograd.grad(loss(), weights)

    step()  # whatever compiles has compiled
    return kept_bytes(lambda: (loss(),), [images, *weights]), peak_bytes(step, images.device)


def kept_bytes(forward: Callable[[], Tensors], held: Iterable[Tensor]) -> int:
    """Bytes that autograd saves in `forward`, without those of `held` and of what it returns."""
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = forward()
    for x in (*held, *outputs):
        saved.pop(x.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def peak_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """The most that is allocated during `step`, less what was before; None without a GPU."""
    if device.type != "cuda":
        return None
    step()
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
