"""Check ``--trainer.precision`` against the hardware, before anything is built."""

from importlib.util import find_spec

import torch

from cola_lightning.errors import InputError

_ADVICE = "bf16-mixed or 32-true"


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
