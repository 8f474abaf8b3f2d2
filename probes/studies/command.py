"""The command `probes study`."""

from llava_bidir.common.options import read_options

from .config import StudyConfig, StudyOptions, label_models
from .parser import build_command_parser, probe_config


def main(argv: list[str]) -> None:
    """Run `probes study`."""
    parser = build_command_parser()
    values = parser.read(argv[1:])
    if len(values.inputs) < 2:
        parser.error(
            "expected a model and a folder of images and masks: probes study MODEL DATA --out DIR"
        )
    *words, data = values.inputs
    models = label_models(words)
    probes = probe_config(parser, values, data, models)
    options = read_options(StudyOptions, values)
    config = StudyConfig(models=models, probes=probes, **vars(options))
    if values.dry_run:
        from .estimate import print_estimate

        print_estimate(config, values.overwrite)
    else:
        from .run import run_study

        run_study(config, values.overwrite)
