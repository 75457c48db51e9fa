"""The proof on real data: MNIST, as `fastvae train --preset mnist-mlp` trains it."""

from pathlib import Path

import pytest
from running import fastvae, metrics, results

DATA = Path(__file__).parents[2].parent / "shared/data"


@pytest.mark.slow
@pytest.mark.skipif(
    not (DATA / "MNIST/raw").is_dir(), reason=f"no MNIST in {DATA}: real data not on this machine"
)
def test_ten_epochs_of_mnist(tmp_path: Path) -> None:
    flags = ["--preset", "mnist-mlp", "--data-dir", DATA, "--output", "run"]
    process = fastvae("train", *flags, folder=tmp_path, timeout=1800, OMP_NUM_THREADS="2")
    assert process.returncode == 0, process.stderr
    run = tmp_path / "run"
    held_out = results(run)["heldout"]
    assert held_out["images"] == 10000
    # The bound on log p(x) of binary images, in nats.
    assert -103 < held_out["elbo"] < -90
    assert 15 < held_out["kl"] < 40
    bounds = [line["heldout_elbo"] for line in metrics(run) if "heldout_elbo" in line]
    assert len(bounds) == 10
    assert bounds[-1] > bounds[0] + 10
    assert fastvae("evaluate", run, folder=tmp_path).returncode == 0
