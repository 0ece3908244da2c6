"""The configs about data can be named on the command line."""

from pathlib import Path

import pytest
import yaml

from cola_lightning.cli.app import main

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize(
    "overlay", ["prepared", "mixture", "fineweb_edu", "dclm", "slimpajama", "the_pile", "redpajama"]
)
def test_each_config_of_data_is_read_with_its_values(overlay, capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", f"{CONFIGS}/data/{overlay}.yaml", "--print_config"])
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["data"]
    assert printed["class_path"] == "cola_lightning.data.StreamingDataModule"
    written = yaml.safe_load((CONFIGS / "data" / f"{overlay}.yaml").read_text())["data"]["init_args"]
    for name in written.keys() - {"sources", "validation"}:
        assert printed["init_args"][name] == written[name]
    for source, given in zip(printed["init_args"]["sources"] or [], written.get("sources", []), strict=True):
        assert given.items() <= source.items()


def test_prepare_reads_its_config(capsys):
    with pytest.raises(SystemExit) as end:
        main(["prepare", "--config", f"{CONFIGS}/prepare/c4.yaml", "--print_config"])
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["source"]["path"] == "allenai/c4"
    assert printed["splits"] == ["validation", "train"]
