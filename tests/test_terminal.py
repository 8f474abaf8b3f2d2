"""Usage errors are one line, with status 2, and say what was meant."""

import pytest

import llava_bidir.cli
import probes.cli

PROGRAMS = {"llava-bidir": llava_bidir.cli.main, "probes": probes.cli.main}
WRONG = {  # words: parts of the line
    "probes fitt": ["no command 'fitt'", "did you mean 'fit'?"],
    "probes knockout RUN --overwrit": ["--overwrit", "did you mean 'overwrite'?"],
    "probes study M D --out R -overwrite": ["-overwrite", "options begin with --"],
    "probes solve --fold 3": ["--fold", "did you mean 'folds'?"],
    "probes fit --model.mllm M --data.root D --site adapter": ["--site", "did you mean 'sites'?"],
    "probes solve --model.mlm DIR": ["--model.mlm", "did you mean 'model.mllm'?"],
    "probes solve -c ade20k --model.mllm DIR": ["required: data.root"],
    "probes solve -c ad20k": ["no config 'ad20k'", "did you mean 'ade20k'?"],
    "probes solve --folds many": ["solver.folds", "int", "many"],
    "probes solve -c ade20k --model.learning_rate 5": ["--model.learning_rate does nothing"],
    "probes solve --feature-norm layernorm": ["--model.feature_norm does nothing"],
    "probes solve --trainer.max_epochs=3": ["--trainer.max_epochs does nothing"],
    "probes study MODEL --out DIR": ["probes study MODEL DATA --out DIR"],
    "probes plant rcovery A B C": ["what", "'recovery', 'drop', 'random'", "rcovery"],
    "probes demo OUT": ["unrecognized arguments: OUT"],
    "llava-bidir generate MODEL": ["required: words"],
    "llava-bidir fit -c stage1 -c clip --out R": ["required: data.annotations, data.images "],
    "llava-bidir export RUN DIR --as-lava": ["--as_lava", "did you mean 'as_llava'?"],
}


@pytest.mark.parametrize("command", WRONG)
def test_usage_errors_are_a_line_that_says_what_was_meant(command, capsys):
    program, *words = command.split()
    with pytest.raises(SystemExit, match="^2$"):
        PROGRAMS[program](words)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{program} {words[0]}: ")
    assert all(part in line for part in WRONG[command]), line
