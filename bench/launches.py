"""How many kernels one optimizer step launches on a GPU: the nodes of its CUDA graph, counted
without a GPU.

    python bench/launches.py                      every preset, eager and compiled
    python bench/launches.py mnist-mlp --kernels  what each of them is

The whole step is taken, by `fastvae.training.updates.Updates`, on tensors that have no memory
(pretended_gpu.py). Eager: each operation that is no view counts as what PyTorch launches for it.
Compiled: the calls in the code that Inductor generates. Both in float32. Not counted are kernels
that cuBLAS or cuDNN launch beside a product (to reduce a split sum, to change a layout).
"""

import argparse
import copy
import logging
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import triton
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from preset_steps import IMAGES, random_data
from pretended_gpu import DEVICE, pretended_compiler, pretended_gpu
from torch import Tensor, fx
from torch._inductor import compile_fx, config
from torch._inductor.graph import GraphLowering
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
    _pop_mode_temporarily,
)
from torch.utils._pytree import tree_leaves, tree_map

from fastvae.build import build_model, build_objective
from fastvae.hardware import image_format
from fastvae.presets import PRESETS, preset
from fastvae.training.buffers import STEPS_THAT_SHOW
from fastvae.training.ema import EMA
from fastvae.training.feed import Feed
from fastvae.training.loop import make_optimizer
from fastvae.training.step import TrainingStep
from fastvae.training.updates import Updates

KINDS = ("Inductor's Triton", "our Triton", "products", "other", "copies and memsets")
INDUCTOR, OURS, PRODUCTS, OTHER, COPIES = KINDS

_PRODUCTS = (
    "mm", "addmm", "bmm", "baddbmm", "addmv", "addbmm", "dot", "mv", "_addmm_activation",
    "bias_addmm", "convolution", "cudnn_convolution", "convolution_backward",
)  # fmt: skip
_FILLS = ("zeros", "zeros_like", "zero_", "zero", "new_zeros")
_NO_LAUNCH = (
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh",
    "_unsafe_view", "_reshape_alias", "record_stream", "_assert_async", "resize_", "set_",
    "is_pinned", "detach_", "_efficientzerotensor", "wait_tensor",
)  # fmt: skip

# aten/src/ATen/native/cuda/MultiTensorApply.cuh: by how many lists an operation goes through
# together, so many tensors and so many chunks of so many elements fit into one launch.
_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_CHUNKS, _CHUNK = 320, 65536


def multi_tensor_launches(tensors: list[Tensor], lists: int) -> int:
    """Launches for a PyTorch operation on lists of tensors."""
    launches = in_launch = chunks = 0
    for i, x in enumerate(tensors):
        of_this = max(1, math.ceil(x.numel() / _CHUNK))
        in_launch += 1
        for chunk in range(of_this):
            chunks += 1
            last = chunk == of_this - 1
            full = in_launch == _TENSORS[lists] and last
            if full or chunks == _CHUNKS or (last and i == len(tensors) - 1):
                launches += 1
                chunks, in_launch = 0, 0 if last else 1
    return launches


def launches_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Of one operation of aten that is no view."""
    if "fused_adam" in name:
        return multi_tensor_launches(args[0], 4)
    if name.startswith("_amp_foreach"):
        return multi_tensor_launches(args[0], 1)
    if name.startswith("_foreach_norm"):
        return multi_tensor_launches(args[0], 1) + 1
    if name.startswith("_foreach"):
        lists = [x for x in args if isinstance(x, list | tuple) and isinstance(x[0], Tensor)]
        return multi_tensor_launches(list(lists[0]), len(lists) + (not name.endswith("_")))
    if name == "convolution_backward":
        return sum(args[-1])
    return 1


def kind_of(name: str) -> str:
    if name in _PRODUCTS:
        return PRODUCTS
    return COPIES if name in _FILLS or name.startswith(("copy", "clone")) else OTHER


class Launches(TorchDispatchMode):
    """What operations launch, eager ones as they come and compiled ones by the code."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[str] = Counter()
        self.names: Counter[str] = Counter()
        self.sources: list[str] = []

    def add(self, kind: str, name: str, count: int = 1) -> None:
        self.kinds[kind] += count
        self.names[f"{kind}: {name}"] += count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in tree_leaves((args, kwargs)))
        # It works in place, and has no rule for shapes where the rate is a tensor.
        result = None if "fused_adam" in name else func(*args, **kwargs)
        on_gpu |= any(isinstance(x, Tensor) and x.is_cuda for x in tree_leaves(result))
        if func.namespace == "fastvae":
            self.inside(func, args, kwargs)
        elif on_gpu and not (
            func.is_view or name in _NO_LAUNCH or func.namespace in ("prim", "profiler")
        ):
            self.add(kind_of(name), name, launches_of(name, args, kwargs))
        return result

    def inside(self, func: Any, args: Any, kwargs: Any) -> None:
        """What one of our operators launches: what is in its body."""

        def launch(kernel: Any, *_: Any, **__: Any) -> None:
            self.add(OURS, kernel.fn.__qualname__ + " of " + func.overloadpacket.__name__)

        with patch.object(triton.runtime.JITFunction, "run", launch), self:
            OPDEFS[func.name().split(".")[0]]._init_fn(*args, **kwargs)

    # ------------------------------------------------------------------------------- compiled

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """What `torch.compile` makes inside is not run but counted."""
        compile_all, compile_function = compile_fx.compile_fx, torch.compile

        def with_ours(*arguments: Any, **settings: Any) -> Any:
            return compile_all(*arguments, **{**settings, "inner_compile": self.compile})

        def uncounted(function: Any, **settings: Any) -> Any:
            compiled = compile_function(function, **settings)

            def call(*arguments: Any, **keywords: Any) -> Any:
                with _without(self):
                    return compiled(*arguments, **keywords)

            return call

        with (
            patch.object(compile_fx, "compile_fx", with_ours),
            patch.object(torch, "compile", uncounted),
        ):
            yield

    def compile(self, graph: fx.GraphModule, inputs: Any, **settings: Any) -> Callable[..., Any]:
        """In place of Inductor's compiler of one graph: what is called computes shapes, and counts
        the calls in the generated code."""
        plain = fx.GraphModule(graph, copy.deepcopy(graph.graph))
        sources: list[str] = []

        class Module:
            call = staticmethod(lambda args: None)
            runner = None
            __file__ = "generated"

        def generate(lowering: GraphLowering) -> Any:
            code = lowering.codegen()[0]
            sources.append(code if isinstance(code, str) else code.value)
            lowering.cache_key, lowering.cache_path = "", ""
            return Module

        off = {"compile_threads": 1, "fx_graph_cache": False, "force_disable_caches": True,
               "max_autotune": False, "triton.cudagraphs": False}  # fmt: skip
        with (
            pretended_compiler(),
            _without(self),
            config.patch(off),
            patch.object(GraphLowering, "compile_to_module", generate),
            patch.object(GraphLowering, "_compile_to_module", generate),
        ):
            self.original(graph, inputs, **settings)
        (source,) = sources
        self.sources.append(source)

        def call(*args: Any) -> Any:
            if len(args) == 1 and isinstance(args[0], list):
                args = tuple(args[0])
            self.read(source, plain)
            with _without(self):
                return fx.Interpreter(plain).run(*args)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    original: Any = staticmethod(compile_fx.compile_fx_inner)

    def read(self, source: str, graph: fx.GraphModule) -> None:
        """Count what the code of `graph` calls."""
        calls = source[source.index("def call(") :]
        for name in re.findall(r"^\s*(\w+)\.run\(", calls, re.M):
            self.add(INDUCTOR, re.sub(r"^triton_|_\d+$", "", name))
        for name in re.findall(r"extern_kernels\.(\w+)\(", calls):
            self.add(kind_of(name), name)
        for _ in re.findall(r"\.copy_\(|\.zero_\(", calls):
            self.add(COPIES, "copy_")
        nodes = [_operator(node) for node in graph.graph.nodes]
        for space, name in re.findall(r"torch\.ops\.(\w+)\.(\w+)\.\w+\(", calls):
            if space == "fastvae":
                continue
            packets = [n and n[0].overloadpacket.__name__.strip("_") for n in nodes]
            same = [
                n for n, packet in zip(nodes, packets, strict=True) if packet == name.strip("_")
            ]
            found = same[0] if same else None
            count = 1 if found is None else launches_of(name, found[1], found[2])
            self.add(kind_of(name), name, count)
        for found in nodes:
            if found and found[0].namespace == "fastvae":
                self.inside(*found)


def _operator(node: fx.Node) -> tuple[Any, Any, Any] | None:
    """The operator that a node calls, and its arguments as they are when traced."""
    if node.op != "call_function":
        return None
    args, kwargs = tree_map(
        lambda x: x.meta["val"] if isinstance(x, fx.Node) else x,
        (node.args, node.kwargs),
        is_leaf=lambda x: isinstance(x, fx.Node),
    )
    target = node.target
    if "auto_functionalized" in str(target):
        target, *args = args
        return target, (), {k: v for k, v in kwargs.items() if not k.startswith("_")}
    return (target, args, kwargs) if isinstance(target, torch._ops.OpOverload) else None


@contextmanager
def _without(mode: TorchDispatchMode) -> Iterator[None]:
    """If `mode` is the innermost, without it."""
    if _get_current_dispatch_mode() is not mode:
        yield
        return
    with _pop_mode_temporarily():
        yield


def move(module: torch.nn.Module) -> None:
    """Parameters and buffers to the pretended device, without their values."""
    for part in module.modules():
        for kept in (part._parameters, part._buffers):
            for name, x in kept.items():
                if x is not None:
                    fake = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=DEVICE)
                    is_parameter = isinstance(x, torch.nn.Parameter)
                    moved = torch.nn.Parameter(fake) if is_parameter else fake
                    kept[name] = moved  # type: ignore[assignment]


def step_of(name: str, compiled: bool) -> Updates:
    """The preset's steps on the pretended device, made as `fastvae.training.train` makes them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = replace(preset(name), compile="off")
    with _disable_current_modes():
        data = random_data(config.data.data)
        model = build_model(config.model, data, config.batch_size)
        model.to(memory_format=torch.channels_last)
        objective = build_objective(config.objective, IMAGES)
        step = TrainingStep(model, objective, config.seed, config.data.flip)
    move(step)
    accelerator = Accelerator(cpu=True, device_placement=False)
    PartialState._shared_state["device"] = AcceleratorState._shared_state["device"] = DEVICE
    optimizer = config.optimizer
    return Updates(
        model,
        step,
        Feed(
            data,
            0,
            DEVICE,
            samples_ahead=config.batch_size,
            memory_format=image_format(model),
        ),
        make_optimizer(optimizer, model),
        EMA(model, optimizer.ema_decay) if optimizer.ema_decay else None,
        accelerator,
        config,
        total_steps=10**6,
        done=0,
        compiled=compiled,
    )


def launches(name: str, compiled: bool) -> Launches:
    """Of one step of a preset that is not among the first."""
    torch._dynamo.reset()
    found = Launches()
    with (
        pretended_gpu(),
        patch("fastvae.hardware._free", lambda device: 2**40),
        patch("fastvae.data.ImageSet.__post_init__", lambda self: None),  # looks at values
        patch("torch.equal", lambda x, y: True),  # so does this, at buffers
        # PyTorch goes through lists of tensors at once, but not if these are shapes alone.
        patch("torch.nn.utils.clip_grad._has_foreach_support", lambda tensors, device: True),
        ExitStack() as stack,
    ):
        stack.enter_context(found.compiling())
        updates = step_of(name, compiled)
        stack.enter_context(found)
        for _ in range(STEPS_THAT_SHOW):
            updates._update()
        found.kinds.clear()
        found.names.clear()
        updates._update()
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=PRESETS)
    parser.add_argument("--kernels", action="store_true", help="what each launch is")
    parser.add_argument("--code", action="store_true", help="the code that Inductor generates")
    chosen = parser.parse_args()
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    print(f"torch {torch.__version__}, one optimizer step on a pretended H100, float32\n")
    print("| preset | step | launches |", " | ".join(KINDS), "|")
    print("| --- | --- |" + " --- |" * (1 + len(KINDS)))
    for name in chosen.presets:
        for compiled in (False, True):
            found = launches(name, compiled)
            row = [found.kinds[kind] for kind in KINDS]
            way = "compiled" if compiled else "eager"
            print(f"| {name} | {way} | {sum(row)} |", " | ".join(map(str, row)), "|", flush=True)
            if chosen.kernels:
                for what, count in sorted(found.names.items()):
                    print(f"    {count:4d} {what}")
            if chosen.code:
                print(*found.sources, sep="\n\n")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # what pretends to be a GPU cannot be taken down in order
