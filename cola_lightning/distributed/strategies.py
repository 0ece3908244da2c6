"""FSDP2 and DeepSpeed strategies, registered for ``--trainer.strategy``, and checks of strategies."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from cola_lightning import optim
from cola_lightning.checkpoints import check_no_code, read_state
from cola_lightning.checkpoints.formats import Format, format_of
from cola_lightning.checkpoints.restore import AS_WRITTEN
from cola_lightning.checkpoints.safe_unpickle import deepspeed_data, plain_data_only
from cola_lightning.distributed.row_files import put_rows, take_rows, write_rows
from cola_lightning.errors import InputError, did_you_mean
from cola_lightning.optim.parameter_groups import needs_whole_matrices
from cola_lightning.optim.rows import Rows, is_dtensor
from cola_lightning.private_apis.deepspeed import guard_engine_writers
from cola_lightning.private_apis.lightning import set_data_parallel_size

if "DS_ACCELERATOR" not in os.environ:  # without it, DeepSpeed prints to stdout what it looks for
    # Child processes inherit the answer. They must not look again, because that initializes CUDA, which a process
    # cannot use after its parent did.
    found = torch.accelerator.current_accelerator(check_available=True)
    os.environ["DS_ACCELERATOR"] = found.type if found else "cpu"


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 over all devices. The units are those of :func:`~cola_lightning.distributed.sharding.shard`.

    Args:
        save_distributed_checkpoint: Each rank writes its shard into a folder. Otherwise rank 0 writes one file.

    Attributes:
        writes_rows: Whether a callback's state may hold ``Rows``, see :mod:`~cola_lightning.distributed.row_files`.
    """

    def __init__(self, save_distributed_checkpoint: bool = False) -> None:
        self.writes_rows = save_distributed_checkpoint
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint)

    def setup_environment(self) -> None:
        set_data_parallel_size(self, self.num_nodes * self.num_processes)  # Lightning's "auto" is one per node
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        rows: dict[str, Rows] = {}
        if "callbacks" in checkpoint:
            checkpoint["callbacks"] = take_rows(checkpoint["callbacks"], rows)
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if rows:
            write_rows(Path(filepath), rows, self.global_rank)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(checkpoint_path)
        check_no_code(path)
        with plain_data_only():
            found = self._load_one_file(path) if path.is_file() else super().load_checkpoint(path, weights_only=True)
        if path.is_dir():
            found["callbacks"] = put_rows(found.get("callbacks", {}), path, self.world_size, self.global_rank)
        return found

    def _load_one_file(self, path: Path) -> dict[str, Any]:
        """Load a file, also that of an optimizer whose parameters have no state, such as SGD without momentum.

        Lightning looks at the first state in the file, and torch at that of the first parameter, without a check that
        there is one. So where the file has none, they load the weights alone, and the optimizer loads the settings of
        its groups by its own method.

        Raises:
            InputError: If the file has states and the optimizer takes none.
        """
        optimizers = self.optimizers
        stored = read_state(path).get("optimizer_states", []) if optimizers else []
        if not stored or any(each["state"] for each in stored):
            try:
                return super().load_checkpoint(path, weights_only=True)
            except AssertionError as error:
                if any(optimizer.state for optimizer in optimizers):  # torch has made the states by then
                    raise
                raise InputError(
                    f"{path} holds states of an optimizer, but {type(optimizers[0]).__name__} as it is set keeps none; "
                    f"{AS_WRITTEN}"
                ) from error
        self.optimizers = []
        try:
            found = super().load_checkpoint(path, weights_only=True)
        finally:
            self.optimizers = optimizers
        for optimizer, settings in zip(optimizers, found["optimizer_states"], strict=True):
            optimizer.load_state_dict(settings)
        return found


class ZeROStrategy(DeepSpeedStrategy):
    """DeepSpeed, with any optimizer, also if the optimizer's states are on the CPU.

    Arguments are those of Lightning's DeepSpeedStrategy.

    Attributes:
        problem: Why this rank could not write its part of the last checkpoint; None if it could. It is not raised,
            because the other ranks would not know and would wait.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        assert self.config is not None  # Lightning's constructor fills it
        # By default DeepSpeed requires its own Adam for offloading. --model.optimizer may still name that one.
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)
        self.problem: str | None = None

    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CUDAAccelerator):
            name = f"deepspeed_stage_{zero_stage(self)}"
            raise InputError(f"--trainer.strategy {name} needs GPUs; on CPUs choose ddp or fsdp2")
        super().setup_environment()

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning divides the loss by the micro-batches of a step, and by default DeepSpeed would divide it again.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        self.problem = None
        with guard_engine_writers(self.deepspeed_engine, self._guarded):
            try:
                super().save_checkpoint(checkpoint, filepath, storage_options)
            except OSError as error:
                self.problem = self.problem or str(error)
                torch.distributed.barrier()

    def _guarded(self, write: Callable[..., None]) -> Callable[..., None]:
        def attempt(*arguments: Any, **named: Any) -> None:
            try:
                write(*arguments, **named)
            except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
                self.problem = self.problem or str(error)

        return attempt

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        check_no_code(Path(checkpoint_path))
        with plain_data_only(), deepspeed_data(Path(checkpoint_path)):  # DeepSpeed itself unpickles
            return super().load_checkpoint(checkpoint_path, weights_only=True)


def zero_stage(strategy: DeepSpeedStrategy) -> int:
    """Return the stage of ZeRO: 1, 2 or 3."""
    assert strategy.config is not None  # Lightning's constructor fills it
    return strategy.config["zero_optimization"]["stage"]


def check_strategy(strategy: object) -> None:
    """Refuse a name of a strategy that is not registered.

    Raises:
        InputError: If the name is unknown. The message suggests a similar one.
    """
    known = StrategyRegistry.available_strategies()
    if isinstance(strategy, str) and strategy not in ("auto", *known):
        raise InputError(
            f"--trainer.strategy {strategy} is unknown{did_you_mean(strategy, known)}; take auto, ddp, fsdp, fsdp2, "
            "deepspeed_stage_1, 2 or 3, or deepspeed_stage_2_offload or 3_offload"
        )


# -- a step -----------------------------------------------------------------------------------------------------------


def check_optimizer(strategy: Strategy, optimizer: Optimizer) -> None:
    """Check that an optimizer can work on the parameters as the strategy stores them.

    FSDP (1) and DeepSpeed flatten parameters, so that no matrix is left for an optimizer with ``needs_matrices``. FSDP2
    gives each rank some rows of every matrix, on which some optimizers cannot work.

    Raises:
        InputError: If it cannot. The message names a strategy that it can work under.
    """
    if getattr(optimizer, "needs_matrices", False) and isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
        raise InputError(
            f"{type(optimizer).__name__} needs each matrix by itself, but {type(strategy).__name__} flattens the "
            f"parameters; set --trainer.strategy fsdp2 or ddp, or name another --model.optimizer"
        )
    whole = [part for part in getattr(optimizer, "parts", ()) if needs_whole_matrices(part)]
    if whole and isinstance(strategy, ModelParallelStrategy):
        kind = type(whole[0])
        ours = kind.__name__ if hasattr(optim, kind.__name__) else "GaLore, Fira, APOLLO or Muon"
        raise InputError(
            f"{kind.__name__} of {kind.__module__.partition('.')[0]} may need whole matrices, of which a rank of "
            f"{type(strategy).__name__} has only some rows; set --trainer.strategy ddp, or take {ours} of "
            f"cola_lightning.optim"
        )


def clip_gradients(strategy: Strategy, parameters: list[nn.Parameter], limit: float | None) -> Tensor | None:
    """Clip gradients by their global norm over all ranks' shards.

    Args:
        strategy: Strategy of the run.
        parameters: Parameters with gradients.
        limit: Largest norm. None, or a limit of at most 0, clips nothing, as in Lightning.

    Returns:
        The norm before clipping; None under DeepSpeed, which clips in its own step by ``gradient_clip_val``.
    """
    if isinstance(strategy, DeepSpeedStrategy):
        return None
    maximum = limit if limit is not None and limit > 0 else float("inf")
    if isinstance(strategy, FSDPStrategy):
        from torch.distributed.fsdp import FullyShardedDataParallel  # slow to import

        root: Any = strategy.model
        if isinstance(root, FullyShardedDataParallel):
            return root.clip_grad_norm_(maximum)  # FSDP's own method; Lightning refuses clip-by-norm here
    return clip_by_global_norm(parameters, maximum)


def clip_by_global_norm(parameters: Iterable[nn.Parameter], maximum: float) -> Tensor:
    """Clip gradients by their global norm, as ``torch.nn.utils.clip_grad_norm_`` does, and return the norm before.

    Where nothing is to be clipped, the gradients are not multiplied by 1, if that is known: without a limit, or on a
    processor, where the host need not wait for the norm.
    """
    clipped = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in clipped if parameter.grad is not None])
    total = norm.full_tensor() if is_dtensor(norm) else norm
    if maximum == float("inf") or (_is_on_host(total) and bool(maximum / (total + 1e-6) >= 1)):
        return total
    torch.nn.utils.clip_grads_with_norm_(clipped, maximum, norm)
    return total


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


# -- resuming ---------------------------------------------------------------------------------------------------------


def check_world_size(strategy: Strategy, path: Path, world_size: int) -> None:
    """Check before anything is built that a strategy can resume from a checkpoint.

    One file can be resumed on one device and under DDP, FSDP and FSDP2, on any number of devices. Shards need FSDP or
    FSDP2. A folder of DeepSpeed needs the stage and the number of devices that wrote it.

    Raises:
        InputError: If the strategy cannot resume from it.
    """
    written, name = format_of(path), type(strategy).__name__
    hint = "go on under the strategy that wrote it, or take its weights by 'cola_lightning export'"
    if isinstance(strategy, DeepSpeedStrategy) != (written is Format.DEEPSPEED):
        raise InputError(f"{path} is {written.value}, which {name} cannot go on from; {hint}")
    if written is Format.SHARDS and not isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        raise InputError(f"{path} is in {written.value}, which {name} cannot go on from; {hint}")
    if isinstance(strategy, DeepSpeedStrategy):
        state = read_state(path)
        theirs = state["ds_config"]["zero_optimization"]["stage"], state["dp_world_size"]
        ours = zero_stage(strategy), world_size
        if theirs != ours:
            raise InputError(
                f"{path} was written by ZeRO-{theirs[0]} on {theirs[1]} devices, which ZeRO-{ours[0]} on {ours[1]} "
                f"cannot go on from; {hint}"
            )


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2, a unit for each decoder layer")
for _stage in (1, 2, 3):
    _offload = {"offload_optimizer": True} | ({"offload_parameters": True} if _stage == 3 else {})
    _name, _register = f"deepspeed_stage_{_stage}", StrategyRegistry.register
    _register(_name, ZeROStrategy, description=f"DeepSpeed ZeRO-{_stage}", override=True, stage=_stage)
    if _stage > 1:
        _about = f"DeepSpeed ZeRO-{_stage}, with the optimizer{' and parameters' * (_stage == 3)} on the CPU"
        _register(f"{_name}_offload", ZeROStrategy, description=_about, override=True, stage=_stage, **_offload)
