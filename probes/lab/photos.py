"""Photos of the lab: uploaded ones, named by a hash of their bytes, and those of the validation split.

Shapes: T image tokens.
"""

import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from PIL import Image

from llava_bidir.common.errors import UserError
from llava_bidir.common.images import read_photo
from probes.data.image_dataset import EmbeddedFile
from probes.ops.geometry import Geometry, GridPlacement

KEPT = 64  # photos; each has a preview of up to 2.4 MB and a square per model of about 0.5 MB
PREVIEW_PX = 896  # longer side of a preview: a panel of 448 px on a screen with two pixels per px


class PhotoFacts(TypedDict):
    """What the page knows of a photo."""

    name: str
    ratio: float
    box: tuple[float, float, float, float]
    truth: tuple[int, ...] | None


@dataclass(frozen=True)
class Photo:
    """A photo as the page and the models see it."""

    name: str
    size: tuple[int, int]  # width and height of the file in pixels
    preview: Image.Image
    squares: tuple[Image.Image, ...]  # the input of each model, before normalisation
    truth: tuple[int, ...] | None = None  # majority class of each patch, -1 if unlabelled

    @classmethod
    def from_image(
        cls, image: Image.Image, name: str, geometries: Sequence[Geometry], **more: Any
    ) -> "Photo":
        """Return an RGB image as a photo. Placing a square again does not change it."""
        preview = image.copy()
        preview.thumbnail((PREVIEW_PX, PREVIEW_PX), Image.Resampling.LANCZOS)
        squares = tuple(geometry.place(image) for geometry in geometries)
        return cls(name, size=image.size, preview=preview, squares=squares, **more)

    def describe(self, geometry: Geometry) -> PhotoFacts:
        """Return name, proportions, labels and the place of the grid, for the page."""
        width, height = self.size
        return {
            "name": self.name,
            "ratio": width / height,
            "box": grid_box(geometry.view((height, width)), (height, width)),
            "truth": self.truth,
        }


class Photos:
    """The photos of a session; safe to use from several threads.

    Args:
        geometries: Geometry of each model.
        dataset: Validation split, or None.
    """

    def __init__(self, geometries: Sequence[Geometry], dataset: Any = None):
        self.geometries = list(geometries)
        self.dataset = dataset
        self._photos: OrderedDict[str, Photo] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, content: bytes, name: str) -> str:
        """Keep an uploaded file and return its key, the same for the same bytes.

        Raises:
            UserError: It is not an image within the limits of the project's reader.
        """
        file = EmbeddedFile(content, name or "the photo")
        image = read_photo(file)
        key = "upload:" + hashlib.sha256(content).hexdigest()
        self._keep(key, Photo.from_image(image, name, self.geometries))
        return key

    def get(self, key: str) -> Photo:
        """Return a photo.

        Raises:
            UserError: The split has no such image, or the server no longer has the uploaded photo.
        """
        with self._lock:
            if key in self._photos:
                self._photos.move_to_end(key)
                return self._photos[key]
        kind, _, number = key.partition(":")
        if kind == "upload":
            raise UserError(
                "the server has dropped this photo; drop the same file again to restore the view"
            )
        index = int(number)
        count = len(self.dataset or ())
        if index >= count:
            raise UserError(
                f"photo {index} of the validation split does not exist; it has {count} images"
            )
        sample = self.dataset[index]
        truth = self.geometries[0].patches(sample["target"]).flatten()
        photo = Photo.from_image(
            sample["image"], sample["name"], self.geometries, truth=tuple(truth.tolist())
        )
        self._keep(key, photo)
        return photo

    def _keep(self, key: str, photo: Photo) -> None:
        with self._lock:
            self._photos[key] = photo
            self._photos.move_to_end(key)
            while len(self._photos) > KEPT:
                self._photos.popitem(last=False)


def encode_image(image: Image.Image, format: str) -> bytes:
    """Return the file of an image."""
    stream = io.BytesIO()
    image.save(stream, format)
    return stream.getvalue()


def grid_box(view: GridPlacement, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return left, top, width and height of the grid as fractions of an image [H, W]."""
    height, width = size
    rows, cols = view
    return (
        cols.start_px / width,
        rows.start_px / height,
        cols.length_px / width,
        rows.length_px / height,
    )
