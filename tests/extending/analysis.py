"""What each layer adds: `probes gains RUN --import analysis.py`, `probes study ... --add gains`."""

import probes


def measure(run, options):
    scores = [run.site_scores[site] for site in run.layers]  # mIoU with its resamplings
    gains = [after - before for before, after in zip(scores, scores[1:], strict=False)]
    rows = [{"layer": i, "gain": gain.value} for i, gain in enumerate(gains, 1)]
    return probes.Result({"gains": rows}, effects={"first_gain": gains[0]})


def figure(results):
    points = [probes.Point(row["layer"], row["gain"]) for row in results["gains"]]
    return probes.Chart([probes.Curve(points)], {p.x: str(p.x) for p in points}, signed=True)


question = "What does each layer add to the one before?"
claim = probes.Claim(+1, "The first layer adds: mIoU at layer 1 − that at the adapter")
shown = {"title": "Gains", "table": lambda results: results["gains"], "figure": figure}
claims = {"first_gain": claim}
gains = probes.Analysis("gains", question, measure=measure, claims=claims, **shown)
probes.register_analysis(gains)
