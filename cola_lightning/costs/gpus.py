"""List GPUs with the memory and peak of their datasheets."""

from dataclasses import dataclass

from cola_lightning.errors import InputError
from cola_lightning.host_memory import GIB


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Args:
        name: Value of ``--gpu``.
        memory: Memory in GiB. Datasheets give GB; the driver shows the same number of GiB, within two per cent.
        peak: Dense bf16 matrix products with float32 accumulation, in TFLOP/s. Datasheets often print twice as much,
            which holds for matrices of which half is zero.
        peak32: Dense float32 products without tensor cores, as PyTorch computes them by default, in TFLOP/s.
        bandwidth: Bandwidth of the memory in GB/s.
        multiprocessors: Number of streaming multiprocessors.
        link: Bandwidth to the other GPUs of a node in one direction, in GB/s: NVLink, or else PCIe.
        generation: NVIDIA's name of the architecture, in lower case.
        reported: Words that all occur in the name that PyTorch reports.
    """

    name: str
    memory: float
    peak: float
    peak32: float
    bandwidth: float
    multiprocessors: int
    link: float
    generation: str
    reported: tuple[str, ...]

    @property
    def usable(self) -> float:
        """Bytes for a training run: 92 %. The rest is CUDA's context, libraries, and gaps between blocks."""
        return 0.92 * self.memory * GIB


# Where one name is part of another, the longer comes first.
# A100: "NVIDIA A100 Tensor Core GPU" datasheet, 312 (624 with sparsity).
# H100: "NVIDIA H100 Tensor Core GPU" datasheet, SXM 1,979, PCIe 1,513, NVL 1,671, each with sparsity.
# H200: "NVIDIA H200 Tensor Core GPU" datasheet, SXM 1,979, NVL 1,671, with sparsity.
# B200: "NVIDIA Blackwell Architecture Technical Brief", HGX B200 2,250 dense; 180 GB in "NVIDIA DGX B200" datasheet.
# L40S: "NVIDIA L40S" datasheet, 362.05 (733 with sparsity). L4: "NVIDIA L4" datasheet, 242 with sparsity.
# RTX 4090 and 3090: "NVIDIA Ada GPU Architecture" whitepaper, bf16 with FP32 accumulate 165.2 and 71.
# Bandwidth, multiprocessors, NVLink (half of the datasheet's sum of both directions) and float32: the same documents.
GPUS = (
    Gpu("a100-40", 40, 312, 19.5, 1555, 108, 300, "ampere", ("A100", "40GB")),
    Gpu("a100-80", 80, 312, 19.5, 2039, 108, 300, "ampere", ("A100", "80GB")),
    Gpu("h100-pcie", 80, 756.5, 51, 2000, 114, 64, "hopper", ("H100", "PCIe")),
    Gpu("h100-nvl", 94, 835.5, 60, 3938, 132, 64, "hopper", ("H100", "NVL")),
    Gpu("h100", 80, 989.5, 67, 3350, 132, 450, "hopper", ("H100",)),
    Gpu("h200-nvl", 141, 835.5, 60, 4800, 132, 64, "hopper", ("H200", "NVL")),
    Gpu("h200", 141, 989.5, 67, 4800, 132, 450, "hopper", ("H200",)),
    Gpu("b200", 180, 2250, 75, 7700, 148, 900, "blackwell", ("B200",)),
    Gpu("l40s", 48, 362, 91.6, 864, 142, 32, "ada", ("L40S",)),
    Gpu("l4", 24, 121, 30.3, 300, 58, 32, "ada", ("L4",)),
    Gpu("rtx4090", 24, 165.2, 82.6, 1008, 128, 32, "ada", ("RTX 4090",)),
    Gpu("rtx3090", 24, 71, 35.6, 936, 82, 32, "ampere", ("RTX 3090",)),
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
