import pytest
import torch
from torch.fx import traceback
from torch.nn.functional import silu

from cola_lightning.methods import CoLA, LowRank
from cola_lightning.methods.cola_m.selective import is_latent


def test_formulas():
    x = torch.randn(2, 3, 20)
    low_rank, cola = LowRank(20, 30, rank=5), CoLA(20, 30, rank=5)
    torch.testing.assert_close(low_rank(x), x @ low_rank.A.weight.T @ low_rank.B.weight.T)
    torch.testing.assert_close(cola(x), silu(x @ cola.A.weight.T) @ cola.B.weight.T)


@pytest.mark.parametrize("projection", [LowRank, CoLA])
def test_entries_of_the_product_start_with_variance_one_over_in_plus_out(projection):
    torch.manual_seed(0)
    module = projection(400, 600, rank=100)
    product = module.B.weight @ module.A.weight
    assert product.var().item() == pytest.approx(1 / 1000, rel=0.05)
    assert module.A.weight.std().item() == pytest.approx((100 * 1000) ** -0.25, rel=0.02)


def test_the_mark_is_on_the_down_projection_alone():
    seen = {}
    module = CoLA(8, 8, rank=2)
    for name, part in module.named_children():
        part.register_forward_hook(lambda *_, name=name: seen.update({name: is_latent()}))
    module(torch.randn(1, 8))
    assert seen == {"A": True, "B": False}
    assert "cola_lightning" not in traceback.current_meta.get("custom", {})
