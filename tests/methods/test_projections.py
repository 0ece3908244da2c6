"""Properties of every projection: dense matrix, initialization, number of parameters."""

from functools import partial

import pytest
import torch

from cola_lightning.errors import InputError
from cola_lightning.methods import SST, CoLA, CoLAM, LoRA, LowRank, ReLoRA, SLTrain, SwitchLoRA
from cola_lightning.models import FullRank, Llama, LlamaConfig
from tests.conftest import tiny_llama

LINEAR = {
    "full_rank": FullRank,
    "low_rank": partial(LowRank, rank=5),
    "lora": partial(LoRA, rank=5),
    "relora": partial(ReLoRA, rank=5),
    "sltrain": partial(SLTrain, rank=5, sparsity=0.2),
    "switch_lora": partial(SwitchLoRA, rank=5),
    "sst": partial(SST, rank=5),
}
# Hidden size, intermediate size, layers, heads, rank, sparsity, and millions of parameters of SLTrain and of LoRA
SIZES = {
    "60m": (512, 1376, 8, 8, 128, 0.03, 43.5, 68.1),
    "130m": (768, 2048, 12, 12, 256, 0.03, 96.5, 178.9),
    "350m": (1024, 2736, 24, 16, 256, 0.03, 194.3, 487.6),
    "1b": (2048, 5461, 24, 32, 512, 0.03, 645.5, 1817.2),
    "7b": (4096, 11008, 32, 32, 1024, 0.05, 3144.7, 9296.9),
}


def moved(make, *sizes):
    """Return a projection in evaluation, away from its start, where factors may be zero."""
    torch.manual_seed(1)
    module = make(*sizes).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name not in ("U", "V"):
                parameter += 0.1 * torch.randn(parameter.shape)
    return module


@pytest.mark.parametrize("sizes", [(20, 30), (30, 20)], ids=["wider", "narrower"])
@pytest.mark.parametrize("name", LINEAR)
def test_dense_does_the_same(name, sizes):
    module = moved(LINEAR[name], *sizes)
    dense = module.dense()
    assert dense.shape == (sizes[1], sizes[0])
    x = torch.randn(2, 3, sizes[0])
    torch.testing.assert_close(module(x), x @ dense.T, atol=1e-5, rtol=1e-5)


def test_cola_has_no_dense_matrix():
    assert CoLA(20, 30, rank=5).dense() is None


@pytest.mark.parametrize("name", LINEAR)
def test_starts_the_same_wherever_it_was_built(name):
    """Built on the meta device, given memory full of nonsense, and then started parents first, as FSDP does."""
    whole = tiny_llama(LINEAR[name])
    with torch.device("meta"):
        network = tiny_llama(LINEAR[name])
    network.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            tensor.fill_(77)
    torch.manual_seed(0)
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[key]), key


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [SLTrain, LoRA, ReLoRA, SwitchLoRA])
def test_parameter_counts(kind, size):
    hidden, intermediate, layers, heads, rank, sparsity, sltrain, lora = SIZES[size]
    settings = {"sparsity": sparsity} if kind is SLTrain else {}
    with torch.device("meta"):
        network = Llama(LlamaConfig(32000, hidden, intermediate, 1, heads), partial(kind, rank=rank, **settings))
    one, layer = (sum(p.numel() for p in part.parameters()) for part in (network, network.model.layers))
    expected = sltrain if kind is SLTrain else lora
    assert (one + (layers - 1) * layer) / 1e6 == pytest.approx(expected, abs=0.05)


def test_parameter_count_of_sst():
    with torch.device("meta"):
        module = SST(512, 1376, rank=64)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained == 64 * (512 + 1376) + 512
    assert sum(p.numel() for p in module.parameters()) == trained + 512 * (512 + 1376)


@pytest.mark.parametrize("kind", [SLTrain, LoRA, ReLoRA, SwitchLoRA, SST])
def test_a_rank_that_does_not_fit_is_refused(kind):
    with pytest.raises(InputError, match="rank 21 does not fit a projection of 30 to 20 features; choose"):
        kind(30, 20, rank=21)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (SLTrain, {"sparsity": 0.001}, "sparsity 0.001 keeps 0 entries of a 20 x 30 matrix"),
        (SLTrain, {"sparsity": 1.2}, "sparsity 1.2 keeps 720 entries"),
        (LoRA, {"dropout": 1.0}, "dropout is 1.0; it must be a share from 0 to below 1"),
    ],
)
def test_arguments_out_of_range_are_refused(make, settings, message):
    with pytest.raises(InputError, match=message):
        make(30, 20, rank=5, **settings)


@pytest.mark.parametrize("name", ["lora", "sltrain", "switch_lora", "sst"])
def test_checkpointing_the_layers_input_gives_the_same_gradients(name):
    """With LoRA's dropout, which has to drop the same again."""
    gradients = []
    for checkpointed in (False, True):
        network = tiny_llama(LINEAR[name])
        if checkpointed:
            CoLAM("block_input").apply(network)
        torch.manual_seed(2)
        network(torch.arange(24).view(2, 12)).square().mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
