"""The analyses of a study: which are run, with which options, and their steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from llava_bidir.common.cli import Parser
from llava_bidir.common.errors import UserError
from probes.analyses import MEASURED
from probes.steps import Step

from .arms import FITTED, Arm, join, kind_of
from .config import StudyConfig

Values = dict[str, Any]  # of options by name
SHOWN_PHOTOS = 3  # with maps by layer, in a study of a bare encoder


def chosen_analyses(study: StudyConfig, photos: int) -> dict[str, Values]:
    """Return the options of each analysis that is run; the default ones and those of `--add`.

    Args:
        study: The study.
        photos: Number of validation images.

    Raises:
        UserError: `--add` names no analysis or option, or one whose file is missing.
    """
    chosen = {
        name: dict(analysis.in_study) for name, analysis in MEASURED.items() if analysis.default
    }
    for text in study.add:
        name, _, setting = text.partition(".")
        if name not in MEASURED:
            raise UserError(
                f"there is no analysis {name!r}; expected one of {', '.join(MEASURED)} (--add)"
            )
        options = chosen.setdefault(name, dict(MEASURED[name].in_study))
        if setting:
            key, equals, value = setting.partition("=")
            if not (key and equals and value):
                raise UserError(
                    f"--add {text}: expected NAME or NAME.OPTION=VALUE, e.g. knockout.classes=sky,road"
                )
            key = key.replace("-", "_")
            options[key] = _read_value(MEASURED[name].options, key, value)
    if "maps" in chosen and chosen["maps"]["image"] == MEASURED["maps"].in_study["image"]:
        chosen["maps"]["image"] = [n for n in chosen["maps"]["image"] if n < photos]
    _add_files_beside_data(study, chosen)
    return chosen


def _read_value(options: type, name: str, text: str) -> Any:
    """Return the value of an option of `--add`; of a list, its parts between commas, or a list of YAML."""
    if "tuple" not in str(get_type_hints(options).get(name)):
        return text
    return yaml.safe_load(text) if text.startswith("[") else text.split(",")


def _add_files_beside_data(study: StudyConfig, chosen: dict[str, Values]) -> None:
    """Add the files that analyses need and that stand beside the data; leave out the analyses that have none.

    Raises:
        UserError: An analysis of `--add` has none.
    """
    named = _names_asked_for(study)
    for name in [*chosen]:
        for option, (file, content) in MEASURED[name].beside_data.items():
            beside = Path(study.probes.data.root).resolve().parent / file
            if beside.is_file() and content in beside.read_bytes():
                chosen[name].setdefault(option, str(beside))
            if option in chosen[name]:
                continue
            if name in named:
                raise UserError(
                    f"--add {name} needs {beside} with {content.decode()}, or {name}.{option}=FILE"
                )
            del chosen[name]


def _names_asked_for(study: StudyConfig) -> set[str]:
    """Return the analyses that `--add` names."""
    return {text.partition(".")[0] for text in study.add}


def check_classes(analyses: Mapping[str, Values], classes: Sequence[str]) -> None:
    """Raise a UserError if a knockout is asked of other classes than those of the data."""
    asked = analyses.get("knockout", {}).get("classes", ())
    if unknown := [name for name in asked if not name.startswith("auto:") and name not in classes]:
        raise UserError(
            f"there is no class {unknown[0]!r}; expected some of {', '.join(map(repr, classes))} (--add); "
            'a name with a comma is given as knockout.classes=["a, b", "c"]'
        )


def steps_of_runs(
    study: StudyConfig,
    arms: Sequence[Arm],
    analyses: Mapping[str, Values],
    photos: int,
) -> list[Step]:
    """Return the steps that analyse each run of a model by itself; `photos` as for :func:`chosen_analyses`."""
    has_llm = arms[0].run.has_llm
    asked = _names_asked_for(study)
    if not has_llm:  # maps of a few photos are made unasked
        shown = dict.fromkeys(i * photos // SHOWN_PHOTOS for i in range(SHOWN_PHOTOS))
        analyses = {"maps": {"image": list(shown)}, **analyses}
    steps = []
    for name, values in analyses.items():
        solved = [arm for arm in arms if not arm.why_left_out]
        analysed = [arm for arm in solved if kind_of(arm.name) in MEASURED[name].arms]
        if not has_llm and not MEASURED[name].of_encoders:
            analysed = analysed[:1] if name in asked else []  # left out, which is said once
        steps += [_of_run(study, arm, name, values) for arm in analysed]
    return steps


def _of_run(
    study: StudyConfig,
    arm: Arm,
    name: str,
    values: Values,
) -> Step:
    """Return the step that analyses a run; random controls also read what was analysed in the trained arm."""
    analysis = MEASURED[name]
    run = study.out / arm.run.name
    trained = join(arm.label, "trained")
    is_control = arm.name not in ("trained", FITTED)  # "probes" have mistakes of their own
    return Step(
        f"{arm.run.name}/{name}",
        Parser(analysis.options).read([], values | {"probes": str(run)}),
        run / analysis.result,
        kind=name,
        reads=_metrics(study, (arm.run.name, trained) if is_control else (arm.run.name,))
        | {f"{name}.{key}": Path(values[key]) for key in analysis.beside_data if key in values}
        | _results(study, [arm.run.name], name),
        takes_overwrite=True,
        # a knockout is then run with the classes of this step (run._classes_to_block), not those of its config
        follows=f"{trained}/{name}" if is_control else "",
        optional=True,
        why_left_out=analysis.why_left_out(arm.run, values),
    )


def _metrics(study: StudyConfig, runs: Sequence[str]) -> dict[str, Path]:
    """Return the file that says that a run is finished, by the run's name."""
    return {run: study.out / run / "metrics.json" for run in runs}


def _results(study: StudyConfig, runs: Sequence[str], name: str) -> dict[str, Path]:
    """Return the results of other analyses that an analysis reads where there are some, by run and analysis."""
    return {
        f"{run}/{other}": study.out / run / MEASURED[other].result
        for run in runs
        for other in MEASURED[name].reads
    }
