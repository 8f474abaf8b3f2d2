"""`probes routes`: does the model say what its probes read, and which way does an answer take to the last token?

Each question asks for the class at a place, its object, with one of the run's class names as the right answer
(questions.py). The probes of all sites read the tokens at that place (several: the mean of their logits).

A route is cut by a knockout with rows and columns of the prompt: no token of the target attends to a token of the
source, in all layers, or in each window of K layers, whose first layers are a stride apart.

    targets   question, last (token before the answer), text (question, last and answer)
    sources   image, all image tokens; object, the patches at the place; random, as many random patches outside of the
              place as the object has, and some of its own where these are too few, averaged over draws

The outcomes are the log-probability of the right answer, normalised over the class names, and whether the most probable
name changes and is right. No probe takes part in them.

    routes.json         accuracies and effects, see cuts.py; "regimes", see blank.py
    routes.safetensors  "image", "right" long[Q]; "none", "blank", "probe:SITE" f[Q, K], log-probabilities without a
                        knockout, "blank" about a blank picture (blank.py);
                        "right:ROUTE" f[Q, 1 + W], that of the right answer, in all layers and by window;
                        "probability:ROUTE" f[Q, 1 + W], the right answer's probability;
                        "changed:ROUTE", "correct:ROUTE" f[Q, 1 + W], 1 where the answer is another one, and where it
                        is right; each the mean over draws

Shapes: Q questions, K classes, W windows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_bidir.common.cli import Count, Seed
from llava_bidir.common.errors import UserError
from probes.analyses.analysis import Analysis, Claim, Result, Row, RunOptions, table_row
from probes.models.sites import layer_number

if TYPE_CHECKING:  # this module answers `probes --help`
    from probes.runs.read import ProbeRun

    from .cuts import RouteResults

QUESTIONS_PER_FILE = 8


@dataclass(frozen=True, kw_only=True)
class RoutesOptions(RunOptions):
    """What to ask, and what to cut.

    Args:
        questions: LLaVA's JSON with regions (default: questions.json beside the data set's folder, as demo-assets
            writes it).
        images: Folder of the images (default: that of the questions).
        limit: Number of questions to ask (default: all).
        window: Layers in a window; each window that fits is cut, and all layers at once.
        stride: Layers from the first of a window to the first of the next one.
        draws: Draws to average for each condition with random tokens.
        batch_size: Questions, each under one knockout, per forward.
        seed: Random seed of the random patches and the bootstrap.
    """

    questions: Path | None = None
    images: Path | None = None
    limit: Count | None = None
    window: Count = 2
    stride: Count = 1
    draws: Count = 3
    batch_size: Count = 32
    seed: Seed = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on, beside the run: the content of the questions, wherever they are."""
        settings = super().settings
        del settings["questions"], settings["images"]
        content = sha256(self.questions.read_bytes()).hexdigest()[:16]
        return settings | {"questions_sha256": content}


def complete(run: "ProbeRun", options: RoutesOptions) -> RoutesOptions:
    """Return the options with both paths, by default beside the folder of the data set.

    Raises:
        UserError: There are no questions, or a window has more layers than the model.
    """
    layers = layer_number(run.last_layer)
    if options.window > layers:
        raise UserError(f"window is {options.window}; expected 1 to {layers}, the model's layers")
    questions = options.questions
    if questions is None:
        questions = Path(run.manifest["data"]["root"]).parent / "questions.json"
    if not questions.is_file():
        raise UserError(
            f"{questions} is not a file; expected questions with regions (--questions FILE.json)"
        )
    return replace(options, questions=questions, images=options.images or questions.parent)


def measure(run: "ProbeRun", options: RoutesOptions) -> Result:
    """Return accuracies and effects, the outcomes of all questions, and the number of the claim.

    Raises:
        UserError: The questions do not fit the run, or its model cannot be asked.
    """
    from .blank import regimes_of
    from .cuts import Asker, answer_statistics, claimed_routes, route_effects
    from .questions import first_questions, read_questions

    classes = run.metrics["classes"]
    file = read_questions(options.questions, classes)
    questions = first_questions(options.questions, file, options.limit)
    asked = range(len(questions))
    asker = Asker(run, options, file)
    tensors = ANALYSIS.in_batches(
        run, options=options, items=asked, size=QUESTIONS_PER_FILE, compute=asker.ask
    )
    rows = {"classes": classes, "questions_file": options.questions.name, "layers": asker.layers}
    rows |= answer_statistics(tensors, run.sites, options.seed)
    rows["regimes"] = regimes_of(tensors, questions, options.seed)
    rows["effects"] = route_effects(tensors, asker.places, options.seed)
    return Result(rows, tensors, claimed_routes(tensors, options.seed))


def lines(results: "RouteResults") -> Iterator[str]:
    """Yield how many answers are right, the effects of cuts in all layers, and the window with the largest one."""
    from probes.score.estimate import estimate_text

    asked = f"{results['questions']} questions about {results['images']} images"
    by_chance = f"{1 / len(results['classes']):.1%} by a random class"
    accuracy = estimate_text(results["accuracy"], ".1%")
    yield f"{asked}, answered correctly: {accuracy} ({by_chance})"
    for entry in results["sites"]:
        accuracy = estimate_text(entry["accuracy"], ".1%")
        agreement = entry["agreement"]["value"]
        yield f"  probe at {entry['site']:<11} {accuracy}, agrees in {agreement:.1%}"
    for kind, entry in results["regimes"].items():
        gain = estimate_text(entry, "+.1%")
        yield f"  {kind} ...: {entry['regime']}, the right answer's probability minus a blank picture's {gain}"
    yield "Change of the right answer's log-probability (nats):"
    for effect in results["effects"]:
        route = f"{effect['source']} to {effect['target']}"
        strongest = max(effect["windows"], key=lambda window: abs(window["value"]))
        first, last = strongest["layers"]
        window = f"most in layers {first}-{last}: {estimate_text(strongest, '+.3f')}"
        yield f"  {route:<27} {estimate_text(effect['all'], '+.3f')}; {window}"


def table_rows(results: "RouteResults") -> Iterator[Row]:
    """Yield the accuracy of the answers, and the effect of each route, cut in all layers, in nats."""
    accuracy = results["accuracy"]
    yield table_row(
        None, metric="answer_accuracy", value=accuracy["value"], interval=accuracy["ci95"]
    )
    for effect in results["effects"]:
        of_all = effect["all"]
        metric = f"route_{effect['source']}_to_{effect['target']}".replace(" - ", "_minus_")
        yield table_row(None, metric=metric, value=of_all["value"], interval=of_all["ci95"])


ANALYSIS = Analysis(
    name="routes",
    help="ask the model about places, also with image, question and answer cut off from each other, into "
    "RUN/routes.json",
    question="Does the model say what its probes read, and which way does an answer take from the patches of its "
    "object to the last token?",
    options=RoutesOptions,
    measure=measure,
    complete=complete,
    lines=lines,
    rows=table_rows,
    title="Answers",
    section="probes.analyses.routes.routes_section:section",
    arms=("trained", "random", "permuted"),
    beside_data={"questions": ("questions.json", b'"regions"')},  # as demo-assets writes it
    claims={
        "route_object": Claim(
            +1,
            "The answer is read from the object: drop of the right answer's probability if no text attends to its "
            "patches, minus as many other patches",
            reads_probes=False,
        )
    },
)
