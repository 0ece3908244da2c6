"""Replace dense projections by their best low-rank approximations."""

from copy import deepcopy

import torch
from rich.console import Console
from rich.progress import track

from cola_lightning.errors import InputError
from cola_lightning.methods.low_rank import LowRank
from cola_lightning.models import Llama, MakeProjection


def low_rank(dense: Llama, projection: MakeProjection, device: torch.device) -> Llama:
    """Make a copy of a network in which each projection is replaced by its best low-rank approximation.

    The factors come from a truncated singular value decomposition. With CoLA a nonlinearity stands between the factors,
    so that they are a start for training and no approximation.

    Args:
        dense: Network with projections that are linear maps. It is not changed.
        projection: Makes a low-rank projection, ``f(in_features, out_features)``.
        device: Where the singular value decompositions are computed.

    Returns:
        A network in the dtype of ``dense``, in eval mode. It shares all tensors but those of the projections with
        ``dense``.

    Raises:
        InputError: If a projection of ``dense`` is not a linear map, or ``projection`` makes none of low rank.
    """
    # The modules are copied, because they get other projections; the tensors are shared, to save memory.
    network = deepcopy(dense, {id(tensor): tensor for tensor in (*dense.parameters(), *dense.buffers())})
    for block in track(list(network.blocks()), "factorizing", console=Console(stderr=True)):
        for name, old in list(block.projections()):
            weight = old.dense()  # (out_features, in_features)
            if weight is None:
                raise InputError(f"{name} is {type(old).__name__}, which is not dense; start from a full-rank model")
            new = projection(weight.shape[1], weight.shape[0]).to(weight.dtype)
            if not isinstance(new, LowRank):
                raise InputError(
                    f"--projection {type(new).__name__} is not low-rank; name LowRank or CoLA, with a rank"
                )
            new.approximate(weight.to(device))
            setattr(block.self_attn if hasattr(block.self_attn, name) else block.mlp, name, new)
    return network.eval()
