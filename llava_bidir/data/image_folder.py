"""Image files that others made: where those that records name may lie, and how any is read.

Images are read as they are stored: an EXIF rotation is not followed, of an animation the first picture is taken, and
transparency is dropped, all like LLaVA. What cannot be shown as it is meant, or not within bounds, is refused.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from llava_bidir.common.errors import UserError
from llava_bidir.common.image_io import FORMATS, open_bounded

PATH_MAX = 4096  # characters, as Linux has it


class BadImage(UserError):
    """An image that cannot be used; `kind` is one of :data:`llava_bidir.commands.verify_data.KINDS`."""

    def __init__(self, message: str, kind: str = "corrupt"):
        super().__init__(message)
        self.kind = kind


def check_name(name: str) -> None:
    """Raises ValueError unless `name` is a path that stays in its folder, links apart: :class:`ImageFolder`."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name or len(name) > PATH_MAX:
        raise UserError(f"'image' must be a path inside data.images, without '..', got {name[:200]!r}")


class ImageFolder:
    """The folder that records' image paths start from.

    Records are downloaded, so none may read what lies elsewhere: :func:`check_name` refuses `..` and absolute paths,
    and a symlink that leads out of the folder is refused here, of a file as of a folder. Links within it are followed,
    and it may be a link itself. Whoever laid it out with links (`coco/train2017 -> /data/coco/train2017`) says so by
    `follow_links`. This guards against what a data set brings along, not against links that change while it is read:
    each image costs one look at itself, and each folder of images one look a process.

    Args:
        path: The folder.
        follow_links: Follow links to wherever they lead.

    Raises:
        UserError: There is no such folder.
    """

    def __init__(self, path: str | Path, follow_links: bool = False):
        self.path, self.follow_links = Path(path), follow_links
        if not self.path.is_dir():
            raise UserError(f"data.images: no folder {self.path}")
        self._real = os.path.realpath(self.path)
        self._stays: dict[Path, bool] = {}

    def file(self, name: str) -> Path:
        """Where an image is, or would be.

        Raises:
            BadImage: A link on its way leads out of the folder.
        """
        path = self.path / name
        if not self.follow_links and not self._is_inside(path):
            raise BadImage(
                f"image {path} is behind a symlink out of data.images, to {os.path.realpath(path)}; if you laid the "
                "folder out with links, set data.follow_links to true",
                "outside",
            )
        return path

    def _is_inside(self, path: Path) -> bool:
        if os.path.islink(path):
            return Path(os.path.realpath(path)).is_relative_to(self._real)
        if path.parent not in self._stays:
            self._stays[path.parent] = Path(os.path.realpath(path.parent)).is_relative_to(self._real)
        return self._stays[path.parent]


def read_image(path: Path) -> Image.Image:
    """The picture, mode RGB.

    Raises:
        BadImage: It is missing, or cannot be read within bounds.
    """
    with _opened(path) as image:
        return image.convert("RGB")


def read_format(path: Path) -> str:
    """PIL's name of the format, from the header alone. Raises as :func:`read_image`, as far as the header tells."""
    with _opened(path) as image:
        return image.format


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture behind its header; whatever goes wrong with it is a BadImage."""
    try:
        with open_bounded(path) as image:
            # Deviates: LLaVA's conversion cuts such values off at 255, which leaves most pictures white.
            if image.mode.startswith(("I", "F")):
                raise UserError(
                    f"mode {image.mode!r}, more than 8 bits, does not say which value is white; save it with 8"
                )
            yield image
    except FileNotFoundError:
        raise BadImage(f"image {path} is missing", "missing") from None
    except UnidentifiedImageError:
        raise BadImage(f"image {path} cannot be read: it is none of {', '.join(FORMATS)}") from None
    except Exception as error:  # files made to break decoders break them in many ways: IndexError, struct.error, ...
        raise BadImage(f"image {path} cannot be read: {str(error) or type(error).__name__}") from None
