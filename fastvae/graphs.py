"""CUDA graphs of functions that do the same operations on the same tensors every time."""

from collections.abc import Callable

import torch


def captured(
    function: Callable[[], None], times: int = 1
) -> tuple[torch.cuda.CUDAGraph | None, str]:
    """A graph of so many calls, on the current stream, which is not the default one; or None, and
    why it cannot be captured. Nothing is computed yet.

    Call the function before: what is compiled, cached or allocated at first use must have been.
    """
    # Other threads go on meanwhile: one copies a checkpoint to the host, NCCL's looks at events.
    mode = "thread_local"
    stream = torch.cuda.current_stream()
    # A graph's matrix products write to the workspace that cuBLAS had when they were captured.
    # Whoever captures next may free it: it is allocated anew, in the graph's own memory.
    torch._C._cuda_clearCublasWorkspaces()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
            for _ in range(times):
                function()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return None, str(error).splitlines()[0]
    finally:
        torch._C._cuda_clearCublasWorkspaces()
    return graph, ""
