"""The fast paths give the losses of the plain one: fused projections, chunked loss, compilation, fused optimizer."""

from functools import partial

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from tests.recorder import Curve
from tests.training.test_module import rows, tiny, trainer

FAST = {
    "fused_projections": {"fused_projections": True},
    "loss_chunk_size": {"loss_chunk_size": 5},
    "fused optimizer": {"optimizer": partial(torch.optim.AdamW, lr=0.01, fused=True)},
    "compile": {"compile": True, "fused_projections": True},
    "compiled chunks": {"compile": True, "loss_chunk_size": 5},
}


def learn(settings, precision="32-true"):
    """Return the losses of twenty steps."""
    L.seed_everything(1)
    watch = Curve()
    batches = [rows(torch.randint(1, 50, (4, 12), generator=torch.Generator().manual_seed(n)).tolist()) for n in [0, 1]]
    run = trainer(max_steps=20, max_epochs=1, gradient_clip_val=0.5, callbacks=[watch], precision=precision)
    model = tiny(**({"optimizer": partial(torch.optim.AdamW, lr=0.01), "num_hidden_layers": 2} | settings))
    run.fit(model, DataLoader(batches * 10, batch_size=None))
    return watch.losses


@pytest.fixture(scope="module")
def plain_curves():
    return {precision: learn({}, precision) for precision in ("32-true", "bf16-true")}


@pytest.mark.slow
@pytest.mark.parametrize("path", FAST)
def test_each_fast_path_gives_the_same_curve(path, plain_curves):
    assert learn(FAST[path]) == pytest.approx(plain_curves["32-true"], abs=1e-5)


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] * ("compile" in FAST[path])) for path in FAST]
)
def test_in_bf16_a_fast_path_is_no_further_from_float32_than_the_plain_one(path, plain_curves):
    exact = torch.tensor(plain_curves["32-true"])
    off, plain_off = (
        (torch.tensor(curve) - exact).abs().max()
        for curve in (learn(FAST[path], "bf16-true"), plain_curves["bf16-true"])
    )
    assert off < 1.5 * plain_off  # which of two roundings is nearer is chance
