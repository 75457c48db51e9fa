"""Which seed a draw takes: one stream of random numbers for each purpose, all from the run's seed.

Every draw is counter-based (`fastvae_kernels.normal`, `uniform`): it depends on the stream's seed,
the global position of the row, and the place in the row. Positions in training count the samples
met since the run began, so a step's noise is the same on any number of ranks and after a resume.
"""

import hashlib

import torch
from torch import Tensor

from fastvae.errors import UserError

# Large constants, so that runs with neighbouring seeds never share a stream.
LATENT = 0x243F6A8885A308D3
OBSERVE = 0x13198A2E03707344
PRIOR = 0x2B7E151628AED2A6
LIKELIHOOD = 0x452821E638D01377
MATCH = 0x3F84D5B5B5470917
REFINE = 0x1BD8ACB2E1B7F3A5
WEIGHTS = 0x6C0CCB1B2A6D4F3B
FLIP = 0x5BE0CD19137E2179

_PURPOSES = (LATENT, OBSERVE, PRIOR, LIKELIHOOD, MATCH, REFINE, WEIGHTS, FLIP)


def stream(seed: int | Tensor, purpose: int) -> int | Tensor:
    """The seed of one purpose's stream, from an int or an int64 tensor (no host wait), which may be
    what `all_streams` made. `purpose`: one of those above, or any int64 of your own."""
    if isinstance(seed, int) and not -(2**63) <= seed < 2**63:
        raise UserError(f"a seed lies in [-2^63, 2^63), got {seed}")
    if isinstance(seed, Tensor) and seed.numel() == len(_PURPOSES):
        if purpose in _PURPOSES:
            return seed[_PURPOSES.index(purpose)]
        return seed[0] ^ _PURPOSES[0] ^ purpose
    return seed ^ purpose


def all_streams(seed: int) -> Tensor:
    """The seeds of all purposes' streams, int64 `[8]`: passed in the run's seed's place, they need
    not be computed in each step, which on a GPU is a launch for each."""
    return torch.tensor([stream(seed, purpose) for purpose in _PURPOSES])


def derived_seed(*names: object) -> int:
    """A seed in [0, 2^63) that is a function of the given values, on every platform."""
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
