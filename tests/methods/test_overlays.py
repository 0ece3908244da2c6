"""Every config of ``configs/method`` with ``configs/strategy/fsdp2.yaml``, in two processes and in bf16-true."""

import json

import pytest
import torch
from safetensors.torch import load_file

from cola_lightning.cli.app import main
from tests.methods.overlay_run import LAST, METHODS, fit_all
from tests.processes import Run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Return the folder of all runs."""
    out = tmp_path_factory.mktemp("overlays")
    Run(fit_all, str(corpus), str(out), ranks=2, folder=out).done()
    return out


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_exports_and_evaluates_under_fsdp2(trained, method, corpus, tmp_path):
    checkpoint = trained / method / "checkpoints" / LAST
    assert list(checkpoint.glob("*.distcp")), "every rank writes its shard"
    main(["export", str(trained / method), str(tmp_path / "model")])
    text = tmp_path / "text.txt"
    text.write_text("the people of the nation upon the commerce")
    main(["evaluate", str(tmp_path / "model"), f"--text={text}", f"--json={tmp_path / 'found.json'}"])
    perplexity = json.loads((tmp_path / "found.json").read_text())["text"]["perplexity"]
    assert 1 < perplexity < 350  # 300 is chance


def test_sst_in_16_bits_keeps_its_singular_values_in_float32_and_resumes_bit_for_bit(trained, tmp_path):
    """FSDP2 gives a unit one dtype, so these are sharded apart from it."""
    weights = []
    for run in ("sst", "sst_resumed"):
        main(["export", str(trained / run), str(tmp_path / run)])
        weights.append(load_file(tmp_path / run / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
