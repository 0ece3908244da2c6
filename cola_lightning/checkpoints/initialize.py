"""Initialize a network from the weights of a folder or checkpoint."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cola_lightning.checkpoints import find_corruption, load_model, read
from cola_lightning.checkpoints.pretrained import check_finite, check_shapes
from cola_lightning.checkpoints.projection_formats import example_projection
from cola_lightning.errors import InputError
from cola_lightning.models import Llama


def initialize_from_folder(network: Llama, folder: str) -> None:
    """Initialize every module of a network from the weights of a folder, cast to the dtype of the network.

    The first values of a module are set by its ``reset_parameters``. This function replaces that method until its first
    call. So it also works for a network on the meta device, which is filled and sharded module by module later. A
    module that has memory already is filled at once.

    Args:
        network: A network that is built, but not compiled or sharded.
        folder: A folder that ``load_model`` reads, or a checkpoint of any strategy.

    Raises:
        InputError: If the folder holds another network, or ZeRO-3 has sharded this one.
    """
    if any(hasattr(parameter, "ds_id") for parameter in network.parameters()):
        raise InputError(
            "--model.initial_weights cannot be filled into a network that ZeRO-3 has sharded; begin with fsdp2 or "
            "deepspeed_stage_2"
        )
    # 1. Check everything before a value is changed: names and shapes, then numbers, then settings that are in no shape.
    weights, found = _read(Path(folder).expanduser())
    trouble = f"--model.initial_weights {folder} holds another network ('factorize' makes low rank of full rank)"
    check_shapes(network, weights, trouble)
    check_finite(weights, f"--model.initial_weights {folder}")
    wanted = settings_beside_weights(network)
    for name, value in found.items():
        if wanted[name] != value:
            raise InputError(f"--model.initial_weights {folder} was made with {name} {value}; set --model.{name} to it")
    # 2. Let each module with weights of its own copy them when it is initialized. Modules on the meta device are
    #    initialized later, when FSDP has given them memory.
    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        values = {key: weights[prefix + key] for key, _ in own if prefix + key in weights}
        if not values:
            continue
        module.reset_parameters = partial(_copy, module, values)
        if not any(tensor.is_meta for _, tensor in own):
            module.reset_parameters()


def settings_beside_weights(network: Llama) -> dict[str, Any]:
    """Collect the settings that change the logits of a network but not the shapes of its weights."""
    names = ("num_attention_heads", "rope_theta", "rope_scaling", "rms_norm_eps", "gate_silu")
    settings = {name: getattr(network.config, name) for name in names}
    return settings | {"projection": type(example_projection(network)).__name__}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights of a folder or checkpoint by name, and the :func:`settings_beside_weights` of a folder.

    There are no settings for a checkpoint, because the command line compares them itself.
    """
    if (path / "config.json").is_file() or not (path.is_file() or path.suffix == ".ckpt"):
        source = load_model(path)
        return source.state_dict(), settings_beside_weights(source)
    if problem := find_corruption(path):
        raise InputError(f"{path} is damaged: {problem}; name another checkpoint")
    return read(path).weights, {}


@torch.no_grad()
def _copy(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy values into a module, and give it back its own ``reset_parameters``."""
    for key, value in values.items():
        getattr(module, key).copy_(value)
    del module.reset_parameters
