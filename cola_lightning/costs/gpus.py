"""List GPUs with the memory and peak of their datasheets."""

from dataclasses import dataclass

from cola_lightning.errors import InputError


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Args:
        name: Value of ``--gpu``.
        memory: Memory in GiB. Datasheets give GB; the driver shows the same number of GiB, within two per cent.
        peak: Dense bf16 matrix products with float32 accumulation, in TFLOP/s. Datasheets often print twice as much,
            which holds for matrices of which half is zero.
        reported: Words that all occur in the name that PyTorch reports.
    """

    name: str
    memory: float
    peak: float
    reported: tuple[str, ...]

    @property
    def usable(self) -> float:
        """Bytes for a training run: 92 %. The rest is CUDA's context, libraries, and gaps between blocks."""
        return 0.92 * self.memory * 2**30


# Where one name is part of another, the longer comes first.
# A100: "NVIDIA A100 Tensor Core GPU" datasheet, 312 (624 with sparsity).
# H100: "NVIDIA H100 Tensor Core GPU" datasheet, SXM 1,979, PCIe 1,513, NVL 1,671, each with sparsity.
# H200: "NVIDIA H200 Tensor Core GPU" datasheet, SXM 1,979, NVL 1,671, with sparsity.
# B200: "NVIDIA Blackwell Architecture Technical Brief", HGX B200 2,250 dense; 180 GB in "NVIDIA DGX B200" datasheet.
# L40S: "NVIDIA L40S" datasheet, 362.05 (733 with sparsity). L4: "NVIDIA L4" datasheet, 242 with sparsity.
# RTX 4090 and 3090: "NVIDIA Ada GPU Architecture" whitepaper, bf16 with FP32 accumulate 165.2 and 71.
GPUS = (
    Gpu("a100-40", 40, 312, ("A100", "40GB")),
    Gpu("a100-80", 80, 312, ("A100", "80GB")),
    Gpu("h100-pcie", 80, 756.5, ("H100", "PCIe")),
    Gpu("h100-nvl", 94, 835.5, ("H100", "NVL")),
    Gpu("h100", 80, 989.5, ("H100",)),
    Gpu("h200-nvl", 141, 835.5, ("H200", "NVL")),
    Gpu("h200", 141, 989.5, ("H200",)),
    Gpu("b200", 180, 2250, ("B200",)),
    Gpu("l40s", 48, 362, ("L40S",)),
    Gpu("l4", 24, 121, ("L4",)),
    Gpu("rtx4090", 24, 165.2, ("RTX 4090",)),
    Gpu("rtx3090", 24, 71, ("RTX 3090",)),
)


def gpu_named(name: str) -> Gpu:
    """Return the GPU with this name.

    Raises:
        InputError: If it is not in the table.
    """
    for gpu in GPUS:
        if gpu.name == name.lower():
            return gpu
    raise InputError(f"--gpu {name} is not known; choose one of {', '.join(gpu.name for gpu in GPUS)}")


def gpu_reported(name: str) -> Gpu | None:
    """Return the GPU with this name of ``torch.cuda.get_device_name()``; None if it is not in the table."""
    words = name.replace("-", " ").split()
    for gpu in GPUS:
        if all(part in words if " " not in part else part in name for part in gpu.reported):
            return gpu
    return None
