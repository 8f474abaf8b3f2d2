"""Check that two runs differ in nothing but their attention mask."""

from llava_bidir.common.errors import UserError

from .probe_run import ProbeRun


def check_pair(causal: ProbeRun, bidirectional: ProbeRun) -> None:
    """Raise a UserError unless these are a causal and a bidirectional run that can be compared image by image."""
    for run, mask in ((causal, "causal"), (bidirectional, "bidirectional")):
        if (own := run.metrics["image_attention"]) != mask:
            raise UserError(
                f"{run.path} has image attention {own!r}; --probes takes the causal run, then the other"
            )
    older = {"match": "none", "draw": 0}  # of runs that do not state them
    for key in ("dataset", "images", "grid", "untrained", *older):
        ours = (older | causal.metrics)[key]
        theirs = (older | bidirectional.metrics)[key]
        if ours != theirs:
            raise UserError(
                f"{causal.path} and {bidirectional.path} differ in {key}: {ours!r} and {theirs!r}; compare runs on the "
                "same data, with the same weights replaced"
            )
    causal.check_same_probes(bidirectional)
    causal.check_same_settings(bidirectional)
    causal.check_same_images(bidirectional)
