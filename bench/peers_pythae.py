"""pythae: an environment of its own, and its own trainer, unchanged, on our network."""

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from torch import Tensor, nn

REQUIREMENTS = ("pythae==0.1.2", "cloudpickle>=2.1", "imageio")
"""Pure Python all of them; what else they import, fastvae's environment has."""

EPOCHS = 1_000_000


def environment(folder: Path) -> Path:
    """The Python of an environment with pythae, made in `folder` unless it is there.

    It sees the packages of the running environment, torch above all, so that both train with the
    same PyTorch. Raises RuntimeError with what pip said.
    """
    python = folder / "bin/python"
    ready = folder / ".ready"
    if ready.exists() and ready.read_text() == sys.prefix:
        return python
    _run(sys.executable, "-m", "venv", "--clear", str(folder))
    scheme = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", scheme))
    ours = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (packages / "torch_of_fastvae.pth").write_text("".join(f"{path}\n" for path in sorted(ours)))
    _run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", *REQUIREMENTS)
    _run(str(python), "-c", "import pythae.models, pythae.trainers")
    ready.write_text(sys.prefix)
    return python


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def run(case: Any, variant: str, pixels: Tensor, beat: Any, folder: Path) -> None:
    """Train for ever with `BaseTrainer`, which writes into `folder`.

    A callback counts images, and the clock runs inside of `train_step` alone.
    """
    from peers_cases import IMAGE_SHAPE, LATENTS, LEARNING_RATE, decoder, encoder
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = encoder(case.model)

        def forward(self, x: Tensor) -> Any:
            mu, logvar = self.network(x).chunk(2, dim=1)
            return ModelOutput(embedding=mu, log_covariance=logvar)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(*decoder(case.model), nn.Sigmoid())

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.network(z))

    class Count(TrainingCallback):
        def on_train_step_begin(self, training_config: Any, **_: Any) -> None:
            self.left = len(pixels)  # called once an epoch
            beat.start()

        def on_train_step_end(self, training_config: Any, **_: Any) -> None:
            images = min(case.batch, self.left)  # called once a batch
            self.left -= images
            beat(images)

        def on_log(self, training_config: Any, logs: dict[str, float], **_: Any) -> None:
            beat.start()  # what lay between two epochs is no training
            beat(0, logs["train_epoch_loss"])

    data = BaseDataset(pixels.float() / 255, pixels.new_zeros(len(pixels)))
    config = VAEConfig(
        input_dim=IMAGE_SHAPE, latent_dim=LATENTS[case.model], reconstruction_loss="bce"
    )
    trainer = BaseTrainer(
        model=VAE(config, encoder=Encoder(), decoder=Decoder()),
        train_dataset=data,
        training_config=BaseTrainerConfig(
            output_dir=str(folder),
            per_device_train_batch_size=case.batch,
            train_dataloader_num_workers=int(variant[0]),
            learning_rate=LEARNING_RATE,
            num_epochs=EPOCHS,
            no_cuda=True,
        ),
        callbacks=[Count()],
    )
    trainer.train()
