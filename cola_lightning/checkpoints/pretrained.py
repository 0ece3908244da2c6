"""Load networks from folders of Hugging Face's LLaMA, of ``export``, and of the reference's CoLA and CoLA-M.

Only safetensors and JSON are read. Nothing is unpickled.
"""

import re
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cola_lightning.checkpoints.pretrained_config import network_arguments, read_key
from cola_lightning.errors import InputError, UnusableModelError
from cola_lightning.models import Llama
from cola_lightning.stored_data import read_json

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# The reference's CoLA-M divides each layer into regions, and the two factors of a projection are in different regions:
# "layers.3.pre_mlp.pre_up_proj" has A and "layers.3.self_mlp.post_up_proj" has B of layer 3's up_proj. B of a layer's
# down_proj is in the next layer.
_REGIONS = (
    (re.compile(r"(layers\.\d+)\.pre_attn\.pre_([qkv])_proj\."), r"\1.self_attn.\2_proj."),
    (re.compile(r"(layers\.\d+)\.self_attn\.(?:post_([qkv])|pre_(o))_proj\."), r"\1.self_attn.\2\3_proj."),
    (re.compile(r"(layers\.\d+)\.post_attn\.post_o_proj\."), r"\1.self_attn.o_proj."),
    (re.compile(r"(layers\.\d+)\.pre_mlp\.pre_(gate|up)_proj\."), r"\1.mlp.\2_proj."),
    (re.compile(r"(layers\.\d+)\.self_mlp\.(?:post_(gate|up)|pre_(down))_proj\."), r"\1.mlp.\2\3_proj."),
    (re.compile(r"(layers\.\d+)\.post_mlp\.post_down_proj\."), r"\1.mlp.down_proj."),
)
_NEXT_LAYER = re.compile(r"layers\.(\d+)\.last_layer_post_mlp\.post_down_proj\.")


def load_model(folder: str | Path) -> Llama:
    """Load the network of a folder with ``config.json`` and safetensors, in eval mode.

    The folder may be of Hugging Face's ``LlamaForCausalLM``, of ``export``, or of the reference implementation's
    ``ColaForCausalLM`` or ``ColaMForCausalLM`` (it stores the factors transposed).

    Returns:
        A network that maps token ids (B, T) int64 to logits (B, T, V). It has the dtype of the file, or the widest one
        if the file mixes dtypes. Embedding and head are one parameter if the folder ties them.

    Raises:
        InputError: If the folder is incomplete, or describes another kind of network.
    """
    folder = Path(folder)
    if (folder / ADAPTER).is_file():
        raise InputError(
            f"{folder} has an adapter beside its weights ({ADAPTER}), which is not read; merge it into them first "
            "(peft: merge_and_unload, then save_pretrained)"
        )
    file = folder / "config.json"
    if not file.exists():
        raise InputError(f"{file} does not exist; name a folder with config.json and model.safetensors")
    settings = read_json(file)
    config, projection = network_arguments(settings, file)
    weights = _one_dtype(dict(_translate(name, tensor) for name, tensor in _read_weights(folder).items()), folder)
    if (layers := config.num_hidden_layers) > len(weights):  # checked before so many layers are built
        raise InputError(f"{file} sets num_hidden_layers to {layers}, but the weights are only {len(weights)} tensors")
    with torch.device("meta"):
        network = Llama(config, projection)
    tied = read_key(settings, file, "tie_word_embeddings", bool, False) and _tie(weights)
    check_shapes(network, weights, f"{folder} does not fit its config.json")
    network.load_state_dict(weights, assign=True)
    if tied:
        network.lm_head.weight = network.model.embed_tokens.weight
    return network.eval()


def _tie(weights: dict[str, Tensor]) -> bool:
    """Fill in embedding or head if one is missing, and say whether both are the same.

    As in transformers, both stay as they are if they differ.
    """
    embedding, head = (weights.get(name) for name in (EMBEDDING, HEAD))
    if embedding is not None and head is not None:
        return torch.equal(embedding, head)
    for name, other in ((EMBEDDING, head), (HEAD, embedding)):
        if other is not None:
            weights.setdefault(name, other)
    return True


def _one_dtype(weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Cast all tensors to the widest dtype among them, so that no precision is lost."""
    for name, tensor in weights.items():
        if tensor.dtype not in DTYPES:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise InputError(f"{folder} holds {name} as {tensor.dtype}, which is not supported; {kinds} are")
    if not weights:
        raise InputError(f"{folder} holds no tensors")
    widest = reduce(torch.promote_types, {tensor.dtype for tensor in weights.values()})
    return {name: tensor.to(widest) for name, tensor in weights.items()}


def check_shapes(network: nn.Module, weights: dict[str, Tensor], trouble: str) -> None:
    """Compare the names and shapes of weights with those of a network.

    Raises:
        InputError: For the first difference; the message begins with ``trouble``.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise InputError(
                f"{trouble}: {name} should have shape {expected.get(name)}, the file has {found.get(name)}"
            )


def check_finite(weights: dict[str, Tensor], place: str | Path) -> None:
    """Refuse weights with NaN or infinity.

    Raises:
        UnusableModelError: For the first tensor that holds one.
    """
    for name, tensor in weights.items():
        if not bool(tensor.isfinite().all()):
            raise UnusableModelError(f"{place}: {name} holds NaN or infinity; take an earlier checkpoint")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    files = [folder / WEIGHTS]
    # As in transformers, prefer a single file to the index of several files, which may be older.
    if not files[0].is_file() and (folder / INDEX).is_file():
        files = [folder / name for name in _parts(folder / INDEX)]
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights |= load_file(file)
        except FileNotFoundError:
            hint = "; pytorch_model.bin is not read, because it can run code; convert it to safetensors"
            raise InputError(f"{file} does not exist{hint if list(folder.glob('*.bin')) else ''}") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is not a whole safetensors file: {error}") from error
    # Older versions also store the rotary frequencies. They follow from config.json, so drop them.
    return {name: tensor for name, tensor in weights.items() if not name.endswith("rotary_emb.inv_freq")}


def _parts(index: Path) -> list[str]:
    """List the files that an index names."""
    parts = read_key(read_json(index), index, "weight_map", dict)
    if not parts or not all(isinstance(name, str) for name in parts.values()):
        raise InputError(f"{index} names no files under weight_map; it must say for each tensor which file holds it")
    names = sorted(set(parts.values()))
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{index} names {name}, which is not in its folder")
    return names


def _translate(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Translate a tensor of the reference: return its name and its layout in this package's network."""
    # Example: "model.layers.4.last_layer_post_mlp.post_down_proj.cola_b" is B of layer 3's down_proj. It becomes
    # "model.layers.3.mlp.down_proj.cola_b" and then "model.layers.3.mlp.down_proj.B.weight", transposed.
    name = _NEXT_LAYER.sub(lambda match: f"layers.{int(match[1]) - 1}.mlp.down_proj.", name)
    for pattern, plain in _REGIONS:
        name = pattern.sub(plain, name)
    for theirs, ours in ((".cola_a", ".A.weight"), (".cola_b", ".B.weight")):
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours, tensor.T.contiguous()
    return name, tensor
