"""What an import brings with it, looked at in a fresh interpreter."""

import json
import subprocess
import sys

import pytest

HEAVY = ["torch", "lightning", "transformers", "datasets", "deepspeed"]


@pytest.mark.parametrize(
    ("statement", "loads"), [("import cola_lightning", []), ("import cola_lightning.models", ["torch"])]
)
def test_an_import_loads_no_more_than_it_needs(statement, loads):
    code = f"{statement}, sys, json; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == loads


def test_the_package_offers_load_model_by_name():
    import cola_lightning
    from cola_lightning.checkpoints import load_model

    assert cola_lightning.load_model is load_model
    with pytest.raises(AttributeError, match="has no attribute 'load_modle'"):
        cola_lightning.load_modle  # noqa: B018
