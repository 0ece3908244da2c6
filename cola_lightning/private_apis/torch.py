"""Private APIs of torch, and of its TensorBoard writer."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import traceback
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: F401
from torch.utils._pytree import tree_leaves  # noqa: F401

if TYPE_CHECKING:
    from torch.distributed.checkpoint import FileSystemReader  # slow to import


from cola_lightning.private_apis.expected import Expected, replaced

aten = torch.ops.aten
ATTENTION_OPS = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Kernels of ``scaled_dot_product_attention``."""
CPU_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward

_FOREACH = ("add_", "sub_", "clamp_min_", "lerp_", "mul_", "addcmul_", "sqrt")
foreach = SimpleNamespace(**{name: getattr(torch, f"_foreach_{name}") for name in _FOREACH})
"""One operation on each tensor of a list, in few kernels: ``foreach.add_`` is ``torch._foreach_add_``."""

int8_product_of_bfloat16 = torch._weight_int8pack_mm
"""``f(x, weight, scale)`` multiplies x (N, in) in bfloat16 by a matrix (out, in) in int8 with factors (out,)."""

_COMPILATIONS = 8
"""Compilations of a function's code that are allowed for each network, which is PyTorch's limit for a process."""


def fake_tensors() -> AbstractContextManager:
    """Make tensors with a shape and a type but no content, while the context lasts."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import

    return FakeTensorMode()


def schema_of(operator: Any) -> Any:
    """Return the schema of an operator: its name, and its arguments with what it overwrites."""
    return operator._schema


def storage_key(tensor: Tensor) -> int:
    """Return a number that is equal for tensors that share memory, fake ones too."""
    return tensor.untyped_storage()._cdata


def mark_operations(mark: dict[str, Any]) -> AbstractContextManager:
    """Mark the operations that are run or traced while the context lasts."""
    return traceback.annotate(mark)


def operation_marks() -> dict[str, Any]:
    """Return the marks of the operation that is run or traced now."""
    return traceback.current_meta.get("custom", {})


def allow_compilations() -> None:
    """Allow PyTorch to compile the code of one more network. Call it for each network that is compiled.

    Layers of all networks share their code, and PyTorch counts the compilations of code in a process: each size, each
    setting of checkpointing, training and evaluation. From the ninth on it would run layers uncompiled, with a warning
    only, so that a comparison of networks would measure compiled ones against others.
    """
    from torch._dynamo import config  # slow to import

    config.recompile_limit += _COMPILATIONS
    config.accumulated_recompile_limit += _COMPILATIONS


def unscales_by_itself(optimizer: Optimizer) -> bool:
    """Whether this optimizer's own step unscales the gradients in place of ``GradScaler``, as fused optimizers do."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def storage_info() -> type:
    """Return the class that says where a sharded checkpoint stores a tensor."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo  # slow to import

    return _StorageInfo


def replace_index_reader(read: "Callable[[FileSystemReader, Path], Any]") -> AbstractContextManager[None]:
    """Let ``torch.distributed.checkpoint`` read the index of a checkpoint by ``read(reader, file)``, not by pickle.

    torch asks for the index of one rank by the argument ``rank``.
    """
    from torch.distributed.checkpoint import FileSystemReader

    def read_metadata(self: FileSystemReader, *args: Any, **kwargs: Any) -> Any:
        return read(self, Path(self._get_metadata_path(kwargs.get("rank"))))

    return replaced(FileSystemReader, "read_metadata", read_metadata)


def event_writer(experiment: Any) -> Any:
    """Return the event writer of a SummaryWriter, reopened if it was closed."""
    return experiment._get_file_writer()


class ExactParameters(nn.Module):
    """Module in which some parameters keep their precision when the module is cast to a lower one.

    Attributes:
        exact: Names of these parameters.
    """

    exact: tuple[str, ...] = ()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        parameters = [getattr(self, name) for name in self.exact]
        exact = [*parameters, *(parameter.grad for parameter in parameters)]

        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            lowers = result.dtype.itemsize < tensor.dtype.itemsize
            return tensor.to(result.device) if lowers and any(tensor is each for each in exact) else result

        return super()._apply(keep_precision, recurse)


_READER = "torch.distributed.checkpoint.filesystem:FileSystemReader"
EXPECTED = (
    Expected("torch.amp.grad_scaler:GradScaler.step", mentions=("_step_supports_amp_scaling",)),
    Expected("torch.optim.adam:Adam.__init__", mentions=("_step_supports_amp_scaling",)),
    Expected("torch.fx.traceback:annotate", "annotation_dict"),
    Expected("torch._subclasses.fake_tensor:FakeTensorMode"),
    Expected("torch._ops:OpOverload.__init__", mentions=("_schema",)),
    Expected("torch:UntypedStorage._cdata"),
    Expected("torch:_weight_int8pack_mm"),
    Expected(f"{_READER}._get_metadata_path", "self, rank"),
    Expected(f"{_READER}.read_metadata", mentions=("_get_metadata_path",)),
    Expected("torch.utils.tensorboard:SummaryWriter._get_file_writer", "self"),
    Expected("torch.nn:Module._apply", "self, fn, recurse"),
)
