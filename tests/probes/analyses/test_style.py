"""Labels of sites on axes."""

import pytest
from matplotlib.figure import Figure

from probes.analyses.style import label_sites, site_depth


def layers(*numbers: int) -> list[str]:
    return [f"layer_{number:02d}" for number in numbers]


@pytest.mark.parametrize(
    ("sites", "labels"),
    [
        (["encoder", "adapter", *layers(1, 2, 3)], ["enc.", "adapt.", "1", "2", "3"]),
        (
            ["encoder", "adapter", *layers(1, 10, 20, 30)],
            ["enc.", "1", "10", "20", "30"],
        ),  # else they overlap
        (["adapter", *layers(*range(1, 33))], [str(number) for number in range(4, 33, 4)]),
    ],
)
def test_sites_have_labels_that_do_not_overlap(sites, labels):
    ax = Figure(figsize=(6, 3), layout="constrained").subplots()
    label_sites(ax, sites)
    depths = [site_depth(site) for site in sites]
    ax.set_xlim(min(depths), max(depths))
    assert [text.get_text() for text in ax.get_xticklabels()] == labels
    ax.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
