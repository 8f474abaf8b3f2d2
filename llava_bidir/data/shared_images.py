"""Images that validation shares with training: the same file, or another one with the same bytes."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from llava_bidir.common.identity import checksums, file_sizes


def shared_images(
    training: Iterable[str], validation: Iterable[str], folder: Path
) -> dict[str, str]:
    """Return the image of training with the same bytes, by image of validation, for those that have one.

    Only files of equal size are read. Missing files have none; they are reported by whatever reads them.

    Args:
        training: Names of training images, relative to `folder`.
        validation: Names of validation images.
        folder: Folder of both.
    """
    trained = set(training)
    asked = sorted(validation)
    found = {name: name for name in asked if name in trained}
    others = [name for name in asked if name not in trained]
    sizes = dict(zip(others, file_sizes(folder, others), strict=True))
    by_size = defaultdict(list)
    candidates = sorted(trained) if others else []
    for name, size in zip(candidates, file_sizes(folder, candidates), strict=True):
        by_size[size].append(name)
    pairs = {name: by_size[size] for name, size in sizes.items() if size > 0 and by_size[size]}
    digests = checksums(folder, {*pairs, *(name for names in pairs.values() for name in names)})
    for name, names in pairs.items():
        equal = [other for other in names if digests[other] and digests[other] == digests[name]]
        if equal:
            found[name] = equal[0]
    return dict(sorted(found.items()))


def describe_shared(shared: dict[str, str], validation: int) -> str:
    """Return one sentence about shared images, with the first three; "" if there are none.

    Args:
        shared: From :func:`shared_images`.
        validation: Number of validation images.
    """
    if not shared:
        return ""
    names = [
        name if name == other else f"{name} (as {other})"
        for name, other in list(shared.items())[:3]
    ]
    more = ", ..." if len(shared) > len(names) else ""
    return (
        f"{len(shared):,} of {validation:,} images of data.val_annotations are training images, too: {', '.join(names)}"
        f"{more}. Scores on them do not tell how well the model does on new images"
    )
