"""Decoding of one image, bounded by its header.

Images are grey (1 channel) or RGB (3). What can be converted without loss is: black and white becomes grey, a palette
becomes RGB, and a grey image among RGB ones is repeated. Anything that would lose something is refused: transparency,
16 bits, CMYK, several frames, a coloured image among grey ones. An orientation in EXIF is not applied.
"""

import io
import warnings
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cdistill.errors import CdistillError, CorruptFileError, MismatchError, brief

Pixels = NDArray[np.uint8]
SUFFIXES = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".webp": "WEBP", ".bmp": "BMP",
    ".dib": "DIB", ".ppm": "PPM", ".pgm": "PPM", ".pbm": "PPM", ".pnm": "PPM", ".gif": "GIF", ".tif": "TIFF",
    ".tiff": "TIFF", ".tga": "TGA", ".qoi": "QOI", ".jp2": "JPEG2000", ".j2k": "JPEG2000", ".avif": "AVIF",
}  # fmt: skip
"""Ends of the names of images that are read, and Pillow's decoder of each."""
LOSSY = ("JPEG", "WEBP", "JPEG2000", "AVIF")  # whose pixels are as a rule not those that were stored
MOST_PIXELS = 16 * 2**20
_MOST_SCANS = 100  # of a progressive JPEG, each of which passes over all pixels; usual are ten
_SCAN = b"\xff\xda"  # within pixels 0xff is followed by 0
_BYTES, _BYTES_A_PIXEL = 2**18, 8  # of a file: for metadata, and for the pixels
_CHANNELS = {"1": 1, "L": 1, "P": 3, "RGB": 3}


def decode(data: bytes, where: str, shape: tuple[int, ...] | None = None) -> Pixels:
    """Decodes one image into (C, H, W), its own or the wanted `shape`; `where` begins every message.

    Raises:
        CorruptFileError: Damaged, no image, too large, or of a kind that would lose something.
        MismatchError: Its size is another, or it has colours and `shape` is grey.
        CdistillError: There is too little memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound of `_check` is lower
            image = Image.open(io.BytesIO(data), formats=_decoders())
        with image:
            wanted = _check(image, where, shape)
            _check_work(image, data, where)
            pixels = np.asarray(image.convert("RGB" if wanted[0] == 3 else "L"))
    except CorruptFileError:
        raise
    except MemoryError as error:
        raise CdistillError(f"{where}: too little memory to decode it; end other programs and try again") from error
    except Exception as error:  # whatever Pillow raises on damaged data: a dozen kinds
        raise CorruptFileError(f"{where}: not a valid image ({brief(error)}); replace it") from error
    return pixels.reshape(wanted[1], wanted[2], wanted[0]).transpose(2, 0, 1)


@cache
def _decoders() -> list[str]:
    """Returns which of these decoders Pillow was built with."""
    Image.init()
    return [name for name in dict.fromkeys(SUFFIXES.values()) if name in Image.OPEN]


def _check(image: Image.Image, where: str, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """Returns the shape that the image must have, judging by its header."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise CorruptFileError(f"{where}: {width}x{height} pixels; at most {MOST_PIXELS:,} are read; make it smaller")
    if getattr(image, "n_frames", 1) > 1:
        raise CorruptFileError(f"{where}: has several frames; store one image per file")
    if image.mode not in _CHANNELS or "transparency" in image.info:
        mode = f"mode {image.mode}" + (" with transparency" if "transparency" in image.info else "")
        raise CorruptFileError(f"{where}: {mode}; images must be grey or RGB, 8 bits, without transparency; convert it")
    own = (_CHANNELS[image.mode], height, width)
    if shape is None:
        return own
    if own[1:] != tuple(shape[1:]):
        raise MismatchError(f"{where}: {width}x{height} pixels; the others have {shape[2]}x{shape[1]}; resize them all")
    if own[0] > shape[0]:
        raise MismatchError(f"{where}: has colours, the first image is grey; convert them all to RGB or all to grey")
    return shape


def _check_work(image: Image.Image, data: bytes, where: str) -> None:
    """Raises CorruptFileError if decoding could take much longer than the image's size justifies."""
    most = _BYTES + _BYTES_A_PIXEL * image.width * image.height
    if len(data) > most:
        raise CorruptFileError(
            f"{where}: {len(data):,} bytes for {image.width}x{image.height} pixels; at most {most:,} are read; "
            "store it again without metadata"
        )
    if image.format == "JPEG" and (scans := data.count(_SCAN)) > _MOST_SCANS:
        raise CorruptFileError(f"{where}: a JPEG of {scans:,} scans; at most {_MOST_SCANS} are read; store it again")
