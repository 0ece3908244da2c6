import pytest
import torch

from cola_lightning.distributed.precision import MixedPrecisionIfFast, check_precision, plugins_beside
from cola_lightning.errors import InputError


@pytest.mark.parametrize(
    ("precision", "capability", "message"),
    [
        ("16-mixed", None, "16-mixed needs a GPU; on a CPU choose bf16-mixed or 32-true"),
        ("16-true", None, "16-true needs a GPU"),
        ("transformer-engine", None, "needs a GPU with float8"),
        ("transformer-engine", (8, 0), "needs a GPU with float8"),
        ("transformer-engine", (9, 0), r"pip install transformer_engine\[pytorch\]"),
        ("bf16-mixed", (7, 5), "needs a GPU with bfloat16 .* choose 16-mixed or 32-true"),
    ],
)
def test_unavailable_precision_is_reported(monkeypatch, precision, capability, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(InputError, match=message):
        check_precision(precision, "auto")


@pytest.mark.parametrize(
    ("precision", "capability"),
    [("32-true", None), ("bf16-mixed", None), ("bf16-true", None), ("16-mixed", (7, 5)), ("bf16-true", (8, 0))],
)
def test_what_can_be_had_passes(monkeypatch, precision, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    check_precision(precision, "auto")


def test_a_gpu_that_is_not_used_does_not_count(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="16-mixed needs a GPU"):
        check_precision("16-mixed", "cpu")


@pytest.mark.parametrize(
    ("units", "in_use", "found"),
    [
        ({"avx512_bf16": True}, "AVX512", "bf16-mixed"),
        ({"amx_bf16": True}, "AVX512", "bf16-mixed"),
        ({"avx512_bf16": True}, "AVX2", "32-true"),
        ({"avx512_bf16": False}, "AVX512", "32-true"),
        ({}, "DEFAULT", "32-true"),
    ],
)
def test_bf16_is_taken_where_the_processor_multiplies_it(monkeypatch, units, in_use, found):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: in_use)
    plugin = MixedPrecisionIfFast()
    assert plugin.precision == found
    with plugin.forward_context():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if found == "bf16-mixed" else torch.float32)


def test_a_precision_that_is_named_replaces_the_choice():
    choice, other = MixedPrecisionIfFast(), object()
    assert plugins_beside(None, [choice, other]) == [choice, other]
    assert plugins_beside("32-true", [choice, other]) == [other]
    assert plugins_beside("32-true", choice) == []
    assert plugins_beside("32-true", None) is None
