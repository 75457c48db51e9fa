"""What becomes of one image, against what PIL and NumPy make of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import chw, noise, refusal, write_image
from PIL import Image, ImageOps

from fastvae.data import DataConfig, decode, load_all, read_images
from fastvae.errors import UserError


def read_one(path: Path, **fields: Any) -> torch.Tensor:
    return read_images([path], DataConfig(**fields)).images[0]


@pytest.mark.parametrize(
    ("mode", "channels"),
    [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3)],
)
def test_grey_or_colour(tmp_path: Path, mode: str, channels: int) -> None:
    image = Image.fromarray(noise(6, 5, 3)).convert(mode)
    image.save(tmp_path / "a.png")
    expected = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    if mode in ("LA", "RGBA"):
        image.putalpha(255)
        image.save(tmp_path / "a.png")
    assert torch.equal(read_one(tmp_path / "a.png"), chw(expected))
    assert read_one(tmp_path / "a.png", channels=1).shape == (1, 6, 5)
    assert read_one(tmp_path / "a.png", channels=3).shape == (3, 6, 5)


def test_one_colour_image_makes_all_colour(tmp_path: Path) -> None:
    grey = write_image(tmp_path / "a.png", noise(4, 4))
    colour = write_image(tmp_path / "b.png", noise(4, 4, 3))
    images = load_all(str(tmp_path), DataConfig()).images
    assert torch.equal(images[0], chw(grey).expand(3, -1, -1))
    assert torch.equal(images[1], chw(colour))
    luma = np.asarray(Image.fromarray(colour).convert("L"))
    assert torch.equal(load_all(str(tmp_path), DataConfig(channels=1)).images[1], chw(luma))


def test_alpha_on_white(tmp_path: Path) -> None:
    pixels = noise(3, 3, 4)
    pixels[0, :, 3], pixels[1, :, 3], pixels[2, :, 3] = 0, 128, 255
    write_image(tmp_path / "a.png", pixels)
    share = pixels[..., 3:] / 255
    expected = pixels[..., :3] * share + 255 * (1 - share)
    found = read_one(tmp_path / "a.png").permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 1
    assert (found[0] == 255).all() and np.array_equal(found[2], pixels[2, :, :3])


def test_transparent_palette_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    assert read_one(tmp_path / "a.png")[:, 0].T.tolist() == [[255, 255, 255], [200, 100, 50]]


@pytest.mark.parametrize("ending", ["png", "tiff", "pgm"])
def test_16_bit_grey_by_full_scale(tmp_path: Path, ending: str) -> None:
    values = np.array([[0, 128, 129, 257], [30000, 32896, 65407, 65535]], dtype=np.uint16)
    write_image(tmp_path / f"a.{ending}", values)
    expected = [[0, 0, 1, 1], [117, 128, 255, 255]]
    assert read_one(tmp_path / f"a.{ending}").tolist() == [expected]
    assert read_one(tmp_path / f"a.{ending}", channels=3)[2].tolist() == expected


def test_float_image_file_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "a.tiff", np.full((4, 4), 0.5, dtype=np.float32))
    message = refusal(tmp_path, whole=True)
    assert "a.tiff" in message and "float32 from 0.5 to 0.5" in message and "16 bits" in message


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_orientation(tmp_path: Path, orientation: int, ending: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    write_image(path, noise(8, 16, 3), exif=exif, lossless=True)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert expected.shape[:2] == ((16, 8) if orientation == 6 else (8, 16))
    assert torch.equal(read_one(path), chw(expected))


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("L", (4, 4), value) for value in (50, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (read_one(tmp_path / "a.gif", channels=1) == 50).all()


# Size


def test_mixed_sizes(tmp_path: Path) -> None:
    for name, shape in (("a", (4, 4)), ("b", (4, 4)), ("c", (6, 5))):
        write_image(tmp_path / f"{name}.png", noise(*shape))
    message = refusal(tmp_path)
    for part in (f"{tmp_path / 'a.png'} is 4 x 4", f"{tmp_path / 'c.png'} is 6 x 5"):
        assert part in message
    assert "--image-size 4 4" in message
    assert load_all(str(tmp_path), DataConfig(image_size=(4,))).image_shape == (1, 4, 4)


def test_crop_keeps_the_shape_of_things(tmp_path: Path) -> None:
    """Three stripes, the middle one square: a square crop sees it alone, a stretch sees all."""
    pixels = np.repeat(np.array([10, 100, 200], dtype=np.uint8), 16)[None].repeat(16, axis=0)
    write_image(tmp_path / "a.png", pixels)
    crop = read_one(tmp_path / "a.png", image_size=(8,))
    assert crop.shape == (1, 8, 8) and (crop[:, :, 1:-1] == 100).all()
    stretch = read_one(tmp_path / "a.png", image_size=(4, 12), resize="stretch")
    assert stretch.shape == (1, 4, 12)
    assert stretch[0, 0, [0, 1, 6, 10, 11]].tolist() == [10, 10, 100, 200, 200]


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    checks = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    write_image(tmp_path / "a.png", checks)
    np.save(tmp_path / "a.npy", checks[None] / np.float32(255))
    assert (read_one(tmp_path / "a.png", image_size=(8,)).float() - 127.5).abs().max() < 3
    floats = load_all(str(tmp_path / "a.npy"), DataConfig(image_size=(8,))).images
    assert floats.dtype == torch.float32 and (floats - 0.5).abs().max() < 0.01


def test_large_jpeg_keeps_its_look_when_shrunk(tmp_path: Path) -> None:
    smooth = np.linspace(0, 255, 640, dtype=np.uint8)[None].repeat(480, axis=0)
    write_image(tmp_path / "a.jpg", smooth, quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        expected = np.asarray(ImageOps.fit(image, (32, 24), Image.Resampling.BILINEAR))
    found = read_one(tmp_path / "a.jpg", image_size=(24, 32))
    assert (found.float() - chw(expected).float()).abs().max() <= 2


@pytest.mark.parametrize("shape", [(7, 9), (7, 9, 3)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_files_and_arrays_agree(
    tmp_path: Path, shape: tuple[int, ...], channels: Any, resize: Any
) -> None:
    pixels = write_image(tmp_path / "a.png", noise(*shape))
    np.save(tmp_path / "a.npy", pixels[None])
    np.save(tmp_path / "f.npy", pixels[None] / 255)
    config = DataConfig(image_size=(5, 4), channels=channels, resize=resize)
    bytes_, files = load_all(str(tmp_path / "a.npy"), config), read_images([tmp_path], config)
    assert torch.equal(bytes_.images, files.images)
    floats = load_all(str(tmp_path / "f.npy"), config)
    assert floats.image_shape == files.image_shape
    assert (floats.images * 255 - files.images).abs().max() <= 1.5  # bytes are rounded twice


def test_too_large_for_memory(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", noise(4, 4))
    found = load_all(str(tmp_path), DataConfig(image_size=(10_000_000,)))
    with pytest.raises(UserError, match="GiB of memory"):
        found.loaded()


# The thread pool


def test_the_first_of_several_errors_is_raised() -> None:
    def work(index: int) -> None:
        if index >= 100:
            raise UserError(str(index))

    for _ in range(5):
        with pytest.raises(UserError, match=r"^100$"):
            decode._for_each(1000, work)
