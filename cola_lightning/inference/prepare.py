"""Prepare a loaded network for generation: merge, round to int8, compile."""

import os
import shutil
import sys

import torch
from torch import Tensor, nn

from cola_lightning.errors import InputError
from cola_lightning.inference.int8 import int8_product, quantize_int8
from cola_lightning.models import FullRank, Llama
from cola_lightning.models.generation_step import CompiledStep, row_product
from cola_lightning.models.layers import NormalLinear, plain_product


def prepare_for_generation(network: Llama, *, int8: bool = False, compile: bool = False) -> None:
    """Change a network so that it generates faster or in less memory. It cannot be trained afterwards.

    Projections that are linear maps with a matrix of their own (LoRA, ReLoRA, SLTrain, SwitchLoRA, SST) become that
    one matrix. CoLA, low rank, CR-Net and LaX keep their factors.

    Args:
        network: The network, on the device that will generate.
        int8: Round matrices to int8, see :func:`~cola_lightning.inference.int8.quantize_int8`: half the bytes of
            bfloat16's matrices.
        compile: Compute each token of a single row by a :class:`~cola_lightning.models.generation_step.CompiledStep`.
            The second token of a continuation then waits for the compiler, once for each network.

    Raises:
        InputError: If it cannot be compiled here.
    """
    if compile:
        check_compiler(network.lm_head.weight.device)
    network.eval().requires_grad_(False)
    merge(network)
    if int8:
        quantize_int8(network)
    if compile:
        for module in network.modules():
            if isinstance(module, NormalLinear):
                module.product = product
        network.generation_step = CompiledStep(network)


def product(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """Multiply (…, in) by a matrix (out, in), in the form that a compiled step needs, or in the form for any shape."""
    if torch.compiler.is_compiling():
        return row_product(x, weight, scale)
    return (plain_product if scale is None else int8_product)(x, weight, scale)


def merge(network: Llama) -> None:
    """Replace each projection that has parameters of its own and is a linear map by its matrix."""
    dtype = network.lm_head.weight.dtype
    for block in network.blocks():
        for name, projection in list(block.projections()):
            own = list(projection.parameters(recurse=False))
            if isinstance(projection, FullRank) or not own or (dense := projection.dense()) is None:
                continue
            with torch.device("meta"):
                merged = FullRank(dense.shape[1], dense.shape[0])
            merged.weight = nn.Parameter(dense.to(dtype), requires_grad=False)
            setattr(block.self_attn if hasattr(block.self_attn, name) else block.mlp, name, merged.eval())


def check_compiler(device: torch.device, instead: str = "--device cpu") -> None:
    """Check that generation can be compiled.

    Args:
        device: Where to compute.
        instead: Option that chooses the processor, for the message.

    Raises:
        InputError: If the device is no processor, or there is no C++ compiler.
    """
    if device.type != "cpu":
        raise InputError(f"--compile is for processors, and the model is on {device}; leave it out, or add {instead}")
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX") or default
    if shutil.which(compiler) is None:
        raise InputError(
            f"--compile needs a C++ compiler, and there is no {compiler}; install it, or leave --compile out"
        )
