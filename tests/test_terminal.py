"""Usage errors are short and say what was meant."""

import pytest

import llava_bidir.cli
import probes.cli

# commands whose `--help` is short, and `--help-all` complete
SHORT = {"llava-bidir": [*llava_bidir.cli.HELP], "probes": ["fit"]}
PARSERS = {"llava-bidir": llava_bidir.cli.build_parser, "probes": probes.cli.build_parser}
PROGRAMS = {"llava-bidir": llava_bidir.cli.main, "probes": probes.cli.main}


@pytest.mark.parametrize(
    ("command", "message", "meant"),
    [
        (
            "probes fit --model.mlm DIR",
            "probes fit: unrecognized arguments: --model.mlm",
            "--model.mllm",
        ),
        (
            "probes solve -c ade20k --model.mllm DIR",
            "probes solve: the following arguments are required",
            None,
        ),
        ("probes fitt", "invalid choice: 'fitt'", "fit"),
    ],
)
def test_usage_errors_have_three_lines_and_say_what_was_meant(
    command,
    message,
    meant,
    capsys,
):
    program, *arguments = command.split()
    with pytest.raises(SystemExit) as stop:
        PROGRAMS[program](arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert message in lines[0]
    assert lines[0].startswith(program)
    assert lines[1:-1] == ([f"did you mean {meant}?"] if meant else [])
    is_short = arguments[0] in SHORT[program]
    option = "--help-all" if is_short else "--help"
    assert lines[-1] == f"All options: {lines[0].partition(':')[0]} {option}"


@pytest.mark.parametrize(
    ("command", "name", "expected"),
    [
        ("probes segment RUN --site encoder --out D a.jpg b.jpg", "photos", "RUN a.jpg b.jpg"),
        ("probes lab RUN --port 0 OTHER", "runs", "RUN OTHER"),
        ("llava-bidir generate MODEL a.jpg --dtype auto Why?", "words", "a.jpg Why?"),
    ],
)
def test_a_list_goes_on_after_an_option(command, name, expected):
    program, *arguments = command.split()
    args = PARSERS[program]().parse_args(arguments)
    assert getattr(args, name) == expected.split()
