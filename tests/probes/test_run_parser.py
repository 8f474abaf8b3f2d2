"""Options of probe runs: what a run or a study writes as YAML is read again as the same options."""

import pytest
import yaml

from probes.run_config import DataOptions, ModelOptions, RunConfig, SolverOptions
from probes.run_parser import RunParser

CONFIG = RunConfig(
    ModelOptions("model", untrained=["llm"], match="update", sites=["adapter"], betas=(0.5, 0.9)),
    DataOptions("photos", options={"background": "class"}, batch_size=3),
    SolverOptions(folds=3, strengths=[0.1, 0.01], memory_gb=0.5),
    trainer={"devices": 2, "callbacks": [{"class_path": "lightning.pytorch.callbacks.Timer"}]},
    out="run",
    ckpt_path="last",
)


@pytest.mark.parametrize("solver", [True, False])
def test_options_written_as_yaml_are_read_again(solver, tmp_path):
    """`probes solve -c RUN/config.yaml`, and each run of a study on several GPUs, which is a command with a file."""
    values = CONFIG.values() if solver else CONFIG.values_of_fit()
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    parser = RunParser("probes solve", "", "", solver=solver)
    read = parser.run_config(parser.read(["-c", str(file)]))
    if not solver:
        assert read.solver == SolverOptions()
    assert (read.values() if solver else read.values_of_fit()) == values
