"""The command of `probes solve` that tests of one and of two processes share."""

import probe_runs

STRENGTHS = ("1e-1", "1e-2")


def arguments(
    checkpoint, root, out, *more: str, strengths: tuple[str, ...] = STRENGTHS
) -> list[str]:
    """Return a command that solves two strengths at three sites, with batches of two."""
    demo = "solve -c configs/demo/probes.yaml --data.batch_size 2 --folds 2".split()
    demo += ["--model.sites", "[encoder, adapter, layer_02]"]
    demo += ["--strengths", *strengths] if strengths else []
    return [*demo, *probe_runs.places(checkpoint, root, out), *more]
