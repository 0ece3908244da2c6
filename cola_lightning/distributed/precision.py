"""Precision: check it against the hardware before anything is built, and choose it by the hardware."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision

from cola_lightning.errors import InputError

_ADVICE = "bf16-mixed or 32-true"


def widest_float(device: torch.device) -> torch.dtype:
    """Return the type for sums on a device: float64, or float32 on Apple's GPU (MPS), which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_precision(precision: object, accelerator: str) -> None:
    """Refuse a precision that this machine lacks. Lightning would change it without a word, or fail later.

    Args:
        precision: Value of ``--trainer.precision``.
        accelerator: Value of ``--trainer.accelerator``.

    Raises:
        InputError: If the hardware or a package is missing.
    """
    precision = str(precision)
    on_gpu = torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")
    if precision in ("16-mixed", "16-true", "16") and not on_gpu:
        raise InputError(f"--trainer.precision {precision} needs a GPU; on a CPU choose {_ADVICE}")
    if on_gpu and precision.startswith("bf16") and torch.cuda.get_device_capability() < (8, 0):
        raise InputError(
            f"--trainer.precision {precision} needs a GPU with bfloat16 (compute capability 8.0, Ampere, or later); "
            "choose 16-mixed or 32-true"
        )
    if not precision.startswith("transformer-engine"):
        return
    if not on_gpu or torch.cuda.get_device_capability() < (8, 9):
        raise InputError(
            f"--trainer.precision {precision} needs a GPU with float8 (compute capability 8.9, Ada or Hopper, or "
            f"later); choose {_ADVICE}"
        )
    if find_spec("transformer_engine") is None:
        raise InputError(
            f"--trainer.precision {precision} needs the package of that name: pip install transformer_engine[pytorch]"
        )


class MixedPrecisionIfFast(MixedPrecision):
    """bf16-mixed on a processor that multiplies bf16 matrices in hardware, and 32-true on any other.

    For ``--trainer.plugins`` of a run on a CPU. A processor without such units multiplies bf16 more slowly than
    float32. ``--trainer.precision`` replaces this plugin.
    """

    def __init__(self) -> None:
        super().__init__("bf16-mixed", "cpu")
        if not multiplies_bf16():
            self.precision = "32-true"

    def autocast_context_manager(self) -> AbstractContextManager[Any]:  # type: ignore[override]
        return super().autocast_context_manager() if self.precision == "bf16-mixed" else nullcontext()


def multiplies_bf16() -> bool:
    """Return whether torch says that it multiplies bf16 matrices by instructions of this processor (AVX-512, AMX).

    Only x86 processors are known; of others the answer is no.
    """
    ask = getattr(torch.cpu, "get_capabilities", dict)  # torch before 2.13 has no such function
    units: Mapping[str, Any] = ask()
    in_use = torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # ATEN_CPU_CAPABILITY may forbid them
    return in_use and bool(units.get("avx512_bf16") or units.get("amx_bf16"))


def plugins_beside(precision: object, plugins: Any) -> Any:
    """Return ``--trainer.plugins`` without a :class:`MixedPrecisionIfFast`, if ``--trainer.precision`` is given."""
    if precision is None or plugins is None:
        return plugins
    named = plugins if isinstance(plugins, Sequence) and not isinstance(plugins, str) else [plugins]
    return [plugin for plugin in named if not isinstance(plugin, MixedPrecisionIfFast)]
