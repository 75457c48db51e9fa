"""Files that are whole or not there, and what tells them apart."""

import hashlib
import math
import os
from pathlib import Path
from typing import Any

from fastvae.errors import UserError


def sha256(path: Path) -> str:
    """Of a file's content, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Have the disk hold what was written: a file's content, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is never seen half written. Raises UserError where it cannot be."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.write_text(text)
        flush(fresh)
        fresh.replace(path)
        flush(path.parent)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written: {error.strerror or error}") from error


def without_nan(value: Any) -> Any:
    """None for what is not finite, such as the spread of one image: JSON has no word for it."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
