"""From encoded images (PNG, JPEG, ...) or raw arrays to one tensor of one size.

Files and arrays take the same way, so a PNG and the array it was made from give equal pixels.
What happens to one image, in this order:

1. Only the first frame of an animation is read. EXIF orientation is applied.
2. 16-bit grey becomes 8-bit by its full scale, 0..65535 to 0..255, whatever values occur in it.
   Images of 32-bit floats are refused: their scale is unknown.
3. Alpha, and the transparent colour of a palette, is composited on white.
4. Palettes and other colour spaces become RGB, or grey by 0.299 R + 0.587 G + 0.114 B. A palette
   counts as colour where `channels` is not given.
5. With an image size: scaled, with antialiased bilinear filtering.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fastvae.data.config import DataConfig
from fastvae.data.stored import BadSample, Encoded, Recipe, StoredImages
from fastvae.errors import UserError

# The formats Pillow may try, and the file endings they have. Not all of Pillow's: some start
# other programs (EPS), and none of the rest holds data sets.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)

_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap the sides
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_BLOCK = 16  # images to one task of the thread pool: one digit alone costs less than its task


def find_encoded(
    count: int,
    item: Callable[[int], Encoded],
    where: Callable[[int], str],
    config: DataConfig,
) -> StoredImages:
    """`count` images to be decoded to uint8 `[N, C, H, W]`; what is read now is their headers.

    `item(i)` gives image i, `where(i)` its name for messages. Raises UserError for a header that
    cannot be read, unless `config` says to skip such images, and for images that differ in size
    where it asks for none.
    """
    greys = np.ones(count, dtype=bool)
    sizes = np.zeros((count, 2), dtype=np.int64)  # 0: not known
    skip_bad = config.on_bad_sample == "skip"

    def read_header(index: int) -> None:
        try:
            with _opened(item(index), where(index)) as image:
                greys[index] = Image.getmodebase(image.mode) == "L"
                sizes[index] = _upright_size(image)
        except BadSample:
            if not skip_bad:
                raise

    _for_each(count, read_header)
    known = np.flatnonzero(sizes.all(axis=1))
    if not len(known):
        raise UserError(f"not one of {count} images can be read, the first is {where(0)}")
    channels = config.channels or (1 if greys.all() else 3)
    size = _wanted_size(config)
    first, other = known[0], known[(sizes[known] != sizes[known[0]]).any(axis=1).argmax()]
    if size is None and other != first:
        (h0, w0), (h1, w1) = sizes[first], sizes[other]
        raise UserError(
            f"the images differ in size: {where(first)} is {h0} x {w0} (height x width) and "
            f"{where(other)} is {h1} x {w1}. Give all of them one size with --image-size, "
            f"for example --image-size {min(h0, h1)} {min(w0, w1)}"
        )

    height, width = map(int, size or sizes[first])

    def decode(encoded: Encoded, name: str) -> NDArray[Any]:
        with _opened(encoded, name) as image:
            if size is not None:
                # JPEG decodes at 1/2, 1/4 or 1/8 almost for free; twice the wanted size or more
                # leaves the filter enough to work on. Other formats ignore it.
                image.draft(None, (2 * max(size), 2 * max(size)))
            ImageOps.exif_transpose(image, in_place=True)
            return _to_array(image, channels, size, config.resize)

    recipe = Recipe(item, where, decode, (channels, height, width), skip_bad)
    return StoredImages(recipe, torch.arange(count))


def fit_images(images: Tensor, config: DataConfig) -> Tensor:
    """Give images the channels and size that `config` asks for.

    `images` is uint8 or float32 `[N, C, H, W]` with C 1 or 3; the result has the same type, and is
    the same tensor where nothing was asked for.
    """
    count, *given = images.shape
    size = _wanted_size(config)
    channels = config.channels or given[0]
    height, width = size or given[1:]
    if given == [channels, height, width]:
        return images

    result = _allocate(count, channels, height, width, images.dtype)
    source, target = images.numpy(), result.numpy()
    fit_one = _fit_bytes if images.dtype == torch.uint8 else _fit_floats

    def fit(index: int) -> None:
        target[index] = fit_one(source[index], channels, size, config.resize)

    _for_each(count, fit)
    return result


def _fit_bytes(
    pixels: NDArray[Any], channels: int, size: tuple[int, int] | None, how: str
) -> NDArray[Any]:
    """uint8 [1|3, H, W] -> uint8 [channels, *size]"""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    return _to_array(image, channels, size, how)


def _fit_floats(
    pixels: NDArray[Any], channels: int, size: tuple[int, int] | None, how: str
) -> NDArray[Any]:
    """float32 [1|3, H, W] -> float32 [1|channels, *size]; one channel stands for all of them"""
    if channels < len(pixels):
        pixels = np.tensordot(_LUMA, pixels, axes=1)[None]
    if size is not None:
        pixels = np.stack([np.asarray(_resize(Image.fromarray(p), size, how)) for p in pixels])
    return pixels.clip(0.0, 1.0)  # rounding may step over by one part in ten million


def _to_array(
    image: Image.Image, channels: int, size: tuple[int, int] | None, how: str
) -> NDArray[Any]:
    """One upright image, by steps 2 to 5 at the top of this file -> uint8 [C, H, W]"""
    if image.mode.startswith("I") or image.mode == "F":
        image = _from_deep_grey(image)
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None:
        image = _resize(image, size, how)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Grey with more than 8 bits -> mode L. Pillow's own conversion clips at 255."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"its pixels are {values.dtype} from {values.min():g} to {values.max():g}, "
            "and only 8 and 16 bits are read; convert it to one of them"
        )
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _resize(image: Image.Image, size: tuple[int, int], how: str) -> Image.Image:
    height, width = size
    if how == "stretch":
        return image.resize((width, height), Image.Resampling.BILINEAR)
    return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)


@contextmanager
def _opened(item: Encoded, where: str) -> Iterator[Image.Image]:
    """Open an image, and say which one it was where that, or what is done with it, fails."""
    try:
        if (len(item) if isinstance(item, bytes) else item.stat().st_size) == 0:
            raise ValueError("it is empty, 0 bytes")
        file = BytesIO(item) if isinstance(item, bytes) else item
        with Image.open(file, formats=FORMATS) as image:
            yield image
    except UserError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        unknown = isinstance(error, UnidentifiedImageError)
        reason = (
            f"it is none of {', '.join(FORMATS)}" if unknown else str(error) or type(error).__name__
        )
        raise BadSample(
            f"{where} cannot be read as an image: {reason}. "
            "Restore it from where it came from, or remove it"
        ) from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) as it will be after EXIF orientation, from the header alone."""
    width, height = image.size
    # Without this condition Pillow would decode a whole PNG to look for the tag behind its pixels.
    sideways = "exif" in image.info and image.getexif().get(_ORIENTATION) in _SIDEWAYS
    return (width, height) if sideways else (height, width)


def _wanted_size(config: DataConfig) -> tuple[int, int] | None:
    """(height, width), or None to keep what the images have."""
    return (config.image_size[0], config.image_size[-1]) if config.image_size else None


def _allocate(count: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    shape = (count, channels, height, width)
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:
        gib = count * channels * height * width * dtype.itemsize / 2**30
        raise UserError(
            f"{count} images of {channels} x {height} x {width} need {gib:.1f} GiB of memory, "
            "more than there is. Make them smaller with --image-size"
        ) from error


def _for_each(count: int, work: Callable[[int], None]) -> None:
    """Call `work` with 0 .. count-1 on a pool of threads; of several errors, raise the first."""

    def block(start: int) -> None:
        for index in range(start, min(start + _BLOCK, count)):
            work(index)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(block, range(0, count, _BLOCK)):
            pass
