"""Locate and read untrusted images of training records.

Images are read as stored, like in LLaVA: EXIF rotation is ignored, the first frame of an animation is used, and
transparency is dropped. Images with an ambiguous value range or an excessive size are rejected.
"""

import os
import unicodedata
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from llava_bidir.common.configs import how_to_make
from llava_bidir.common.errors import UserError
from llava_bidir.common.image_io import FORMATS, as_stored, open_bounded

PATH_MAX = 4096  # characters, the limit of Linux


class BadImage(UserError):
    """Image that cannot be used."""


def check_name(name: str) -> None:
    """Raise UserError unless `name` is a relative path inside its folder; :class:`ImageFolder` checks links."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name or len(name) > PATH_MAX:
        raise UserError(
            f"'image' must be a relative path inside data.images without '..', got {name[:200]!r}"
        )


class ImageFolder:
    """Folder that the image paths of records are relative to.

    Untrusted records must not read files elsewhere. :func:`check_name` rejects `..` and absolute paths. This class
    rejects symlinks of files and folders that lead out of the folder; links inside it are followed, and the folder may
    be a link itself. `follow_links` allows a layout of your own (`coco/train2017 -> /data/coco/train2017`). Links that
    change while they are read are not detected: this costs one `lstat` per image and one `realpath` per folder and
    process.

    Args:
        path: The folder.
        follow_links: Follow all links.

    Raises:
        UserError: The folder does not exist.
    """

    def __init__(self, path: str | Path, follow_links: bool = False):
        self.path = Path(path)
        self.follow_links = follow_links
        if not self.path.is_dir():
            raise UserError(f"data.images: no folder {self.path}{how_to_make(self.path)}")
        self._real = os.path.realpath(self.path)
        self._inside: dict[Path, bool] = {}

    def file(self, name: str) -> Path:
        """Return the path of an image, which need not exist.

        Raises:
            BadImage: A link in the path leads out of the folder.
        """
        path = self._normalised(self.path / name)
        if not self.follow_links and not self._is_inside(path):
            raise BadImage(
                f"image {path} is outside data.images: a symlink leads to {os.path.realpath(path)}; if you made this "
                "link, set data.follow_links to true"
            )
        return path

    def _normalised(self, path: Path) -> Path:
        """Return the file whose name differs only in how accents are stored: macOS and Linux write "é" otherwise."""
        if str(path).isascii() or os.path.lexists(path):
            return path
        forms = [Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD")]
        return next(filter(os.path.lexists, forms), path)

    def _is_inside(self, path: Path) -> bool:
        if os.path.islink(path):
            return Path(os.path.realpath(path)).is_relative_to(self._real)
        if path.parent not in self._inside:
            self._inside[path.parent] = Path(os.path.realpath(path.parent)).is_relative_to(
                self._real
            )
        return self._inside[path.parent]


def read_image(path: Path) -> Image.Image:
    """Return the image in mode RGB, with the pixels as stored.

    Raises:
        BadImage: The image is missing, cannot be decoded, or is too large.
    """
    try:
        # Deviates: LLaVA's conversion clips values of more than 8 bits at 255, which makes most images white
        with open_bounded(path) as image:
            return as_stored(image)
    except FileNotFoundError:
        raise BadImage(f"image {path} is missing") from None
    except UnidentifiedImageError:
        raise BadImage(
            f"image {path} cannot be read: it is not one of {', '.join(FORMATS)}"
        ) from None
    # decoders fail in many ways on malformed files: IndexError, struct.error, ...
    except Exception as error:
        raise BadImage(
            f"image {path} cannot be read: {str(error) or type(error).__name__}"
        ) from None
