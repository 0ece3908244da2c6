"""Use private APIs of Lightning, torch, jsonargparse and DeepSpeed, each behind a small function.

A new version may change such an API without notice. :func:`check_private_apis` compares each with what this file was
written for, and names what has changed. The command line calls it before a run, and the tests call it in full. No other
file of this package uses a private API (tests/test_private_apis.py). CONTRIBUTING.md describes the upgrade of a
library.
"""

import functools
import importlib
import importlib.metadata
import inspect
import multiprocessing.queues
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import jsonargparse
import lightning as L
import lightning.pytorch.strategies.fsdp as fsdp_strategy
import torch
from jsonargparse import _common, _completions, _completions_jsonschema, _loaders_dumpers, _typehints, _util
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.fx import traceback
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: F401
from torch.utils._pytree import tree_leaves  # noqa: F401
from torch.utils.data import BatchSampler, DataLoader
from torchmetrics import Metric

from cola_lightning.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.checkpoint import FileSystemReader  # slow to import


class PrivateAPIError(InputError):
    """Private API of a library that is not what this file was written for."""

    exit_status = 1


# -- Lightning's fit loop ---------------------------------------------------------------------------------------------

FETCH = "[_TrainingEpochLoop].train_dataloader_next"
"""Name under which Lightning's profiler measures how long the next batch of the loader takes."""


def is_accumulating(trainer: L.Trainer) -> bool:
    """Whether the batch just trained on ends no optimizer step."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def is_last_batch(trainer: L.Trainer) -> bool:
    """Whether the batch just trained on is the last of its epoch."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def is_validation_due(trainer: L.Trainer) -> bool:
    """Whether Lightning validates after the batch just trained on."""
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher  # only its type matters, so that None will do
    return loop.epoch_loop._should_check_val_fx(fetcher)  # type: ignore[arg-type]


@contextmanager
def validate_also(trainer: L.Trainer, condition: Callable[[], bool]) -> Iterator[None]:
    """Validate also where ``condition()`` is true, while the context lasts."""
    epoch_loop = trainer.fit_loop.epoch_loop
    decide = epoch_loop._should_check_val_fx
    # An attribute of the object hides the method of its class; it is deleted afterwards.
    vars(epoch_loop)["_should_check_val_fx"] = lambda fetcher: decide(fetcher) or condition()
    try:
        yield
    finally:
        del vars(epoch_loop)["_should_check_val_fx"]


def validates_by_time(trainer: L.Trainer) -> bool:
    """Whether ``val_check_interval`` is a duration."""
    return trainer._val_check_time_interval is not None  # type: ignore[attr-defined]  # a connector sets it


def logged_step(trainer: L.Trainer) -> int:
    """Return the step that loggers get for what is logged now."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def set_logged_step(trainer: L.Trainer, step: int) -> None:
    """Set the step that loggers get next."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


@contextmanager
def keep_logging_position(trainer: L.Trainer) -> Iterator[None]:
    """Restore the logger connector's place in the loop at the end, as Lightning does around a validation."""
    connector = trainer._logger_connector
    first = connector._first_loop_iter
    yield
    connector._first_loop_iter = first


def count_validation_on_resume(trainer: L.Trainer, count: bool) -> None:
    """Choose whether Lightning adds the batches of the validation that is due at a resumed step to its progress.

    Lightning assumes that this validation was made before the checkpoint, and adds its batches before the first
    training batch. If it is made after resuming, its batches are counted one by one and must not be added again.
    """
    loop, name = trainer.fit_loop.epoch_loop.val_loop, "increment_progress_to_evaluation_end"
    vars(loop).pop(name, None)
    if not count:
        vars(loop)[name] = lambda: None  # An attribute of the object hides the method of its class.


def log_step_now(trainer: L.Trainer) -> None:
    """Send what this step has logged to the loggers now, and not again when the batch ends."""
    connector, name = trainer._logger_connector, "update_train_step_metrics"
    connector.update_train_step_metrics()
    vars(connector)[name] = functools.partial(vars(connector).pop, name)  # in place of the next call, and gone with it


def skip_sigterm_broadcast(trainer: L.Trainer) -> None:
    """Leave out the broadcast on the device by which Lightning's ranks tell each other of SIGTERM at each batch."""
    vars(trainer.fit_loop.epoch_loop)["_broadcast_sigterm_tensor"] = lambda: None


def ignore_signals(trainer: L.Trainer) -> None:
    """Keep Lightning from handling signals, and from resuming ``hpc_ckpt_….ckpt`` in the working directory."""
    vars(trainer._signal_connector)["register_signal_handlers"] = lambda: None
    connector: Any = trainer._checkpoint_connector
    connector.__class__ = type("NoHPCCheckpoints", (type(connector),), {"_hpc_resume_path": None})


def restore_within(trainer: L.Trainer, context: Callable[[], AbstractContextManager[None]]) -> None:
    """Enter ``context()`` around each part of a checkpoint that this trainer restores."""
    connector = trainer._checkpoint_connector
    for name in ("_restore_modules_and_callbacks", "restore_training_state"):
        vars(connector)[name] = _within(getattr(type(connector), name).__get__(connector), context)


def _within(function: Callable[..., None], context: Callable[[], AbstractContextManager[None]]) -> Callable[..., None]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        with context():
            function(*args, **kwargs)

    return call


def unwrap_data_loaders() -> None:
    """Give data loaders and samplers of torch, and subclasses of them, their own methods again.

    Lightning wraps these methods while it asks for a loader, and leaves them wrapped if that raises. The next run in
    the same process, as in a notebook, would then fail where Lightning makes a loader anew.
    """
    classes: list[type] = [DataLoader, BatchSampler]
    for cls in classes:  # grows on the way
        classes += cls.__subclasses__()
        for name in ("__setattr__", "__delattr__", "__init__"):
            if (own := vars(cls).get(f"__old{name}")) is not None:
                setattr(cls, name, own)
                delattr(cls, f"__old{name}")


# -- Lightning's callbacks and strategies -----------------------------------------------------------------------------


class LatestCheckpoint(ModelCheckpoint):
    """ModelCheckpoint; a subclass decides which checkpoint ``Trainer.fit(ckpt_path="last")`` means."""

    def latest(self, trainer: L.Trainer) -> Path | None:
        """Return the checkpoint to resume from, or None."""
        raise NotImplementedError

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        found = self.latest(trainer)
        return {str(found)} if found else set()

    @property
    def last_saved_step(self) -> int:
        """Number of optimizer steps at the newest checkpoint."""
        return self._last_global_step_saved

    @last_saved_step.setter
    def last_saved_step(self, step: int) -> None:
        set_last_saved_step(self, step)


class DescribedProgressBar(RichProgressBar):
    """Progress bar; a subclass chooses the text before the bar of training."""

    def training_description(self) -> str:
        """Return the text before the bar."""
        raise NotImplementedError

    def _get_train_description(self, current_epoch: int) -> str:
        return self.training_description()


def set_last_saved_step(callback: ModelCheckpoint, step: int) -> None:
    """Set the last step that a callback has saved. It does not save the same step again."""
    callback._last_global_step_saved = step


def global_seed() -> int:
    """Return the seed of ``seed_everything``; 0 if it was not called."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Set the number of ranks among which FSDP2 shards, once it is known."""
    strategy._data_parallel_size = size


def ddp_options(strategy: Strategy) -> dict[str, Any]:
    """Return the options of DistributedDataParallel; empty for other strategies."""
    return strategy._ddp_kwargs if isinstance(strategy, DDPStrategy) else {}


def has_own_checkpointing(strategy: Strategy) -> bool:
    """Whether an FSDP strategy was given an ``activation_checkpointing_policy``."""
    return isinstance(strategy, FSDPStrategy) and bool(strategy._activation_checkpointing_kwargs)


def replace_fsdp_loader(load: Callable[[Path], Any]) -> AbstractContextManager[None]:
    """Let FSDP (1) read a checkpoint in one file by ``load`` in place of its own unpickler."""
    return _replaced(fsdp_strategy, "_lazy_load", load)


# -- torch ------------------------------------------------------------------------------------------------------------

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

    return _replaced(FileSystemReader, "read_metadata", read_metadata)


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


class ExactMetric(Metric):
    """Metric with states that are moved to the module's device, but not cast to its precision.

    On Apple's GPU (MPS), which has no float64, such states become float32.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = ()) -> Any:
        def move(tensor: Tensor) -> Tensor:
            try:
                return fn(tensor).to(tensor.dtype)
            except TypeError:  # torch's error for float64 on MPS
                return fn(tensor.float()).float()

        return super()._apply(move, exclude_state)


# -- jsonargparse and argparse ----------------------------------------------------------------------------------------


def commands_of(parser: jsonargparse.ArgumentParser) -> dict[str, jsonargparse.ArgumentParser]:
    """Return the parser of each command."""
    action = parser._subcommands_action
    return action._name_parser_map if action else {}


def options_of(parser: jsonargparse.ArgumentParser) -> list[str]:
    """List all options of a parser, such as ``--config``."""
    return list(parser._option_string_actions)


def replace_yaml_loader(loader: type) -> None:
    """Let jsonargparse read configs and the values of flags by this loader of PyYAML."""
    _replace(_loaders_dumpers, "yaml_default_loader", loader)


check_import_path = _common.check_import_path
ImportDenied = _common.ImportDenied


def replace_import_check(check: Callable[[str], None]) -> None:
    """Let jsonargparse call ``check(path)`` before it imports a path. To refuse, ``check`` raises ``ImportDenied``."""
    for module in (_util, _typehints):
        _replace(module, "check_import_path", check)


def keep_untyped_values() -> None:
    """Keep jsonargparse from making an object of a mapping with ``class_path`` where a value may be anything."""
    _replace(_typehints, "adapt_classes_any", lambda value, *_, **__: value)


@contextmanager
def replace_subclass_lists(change: Callable[[Callable], Callable]) -> Iterator[None]:
    """Let completion scripts and schemas list subclasses by ``change(function)``.

    ``function(cls, …)`` is jsonargparse's, which returns import paths.
    """
    changed = change(_completions.get_all_subclass_paths)
    with (
        _replaced(_completions, "get_all_subclass_paths", changed),
        _replaced(_completions_jsonschema, "get_all_subclass_paths", changed),
    ):
        yield


# -- DeepSpeed and multiprocessing ------------------------------------------------------------------------------------


@contextmanager
def guard_engine_writers(engine: Any, guard: Callable[[Callable], Callable]) -> Iterator[None]:
    """Let a DeepSpeed engine write each file of a checkpoint through ``guard(write)``.

    ``guard`` gets all writes between two collectives, except that of the last file, before the last collective.
    """
    writers = [(engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script")]
    for owner, name in writers:
        setattr(owner, name, guard(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name in writers:
            delattr(owner, name)


def on_unsendable_item(act: Callable[[Exception, Any], None]) -> None:
    """Call ``act(error, item)`` in this process if a queue cannot send an item.

    By default the item is dropped with a traceback, and the reader waits for it without end.
    """
    _replace(multiprocessing.queues.Queue, "_on_queue_feeder_error", staticmethod(act))


# -- checks -----------------------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """A private API, and what this file expects of it.

    Attributes:
        path: ``module:name`` or ``module:Class.name``.
        parameters: Names of the arguments; None if it is not a function, or its arguments do not matter.
        mentions: Names and texts that the function's code must have: an attribute that it sets or reads, or a method
            that it calls and this file replaces.
    """

    path: str
    parameters: str | None = None
    mentions: tuple[str, ...] = ()

    @property
    def library(self) -> str:
        """Name of the library for ``pip``."""
        return self.path.partition(":")[0].partition(".")[0]


_LOOPS, _TRAINER = "lightning.pytorch.loops", "lightning.pytorch.trainer"
_EPOCH_LOOP = f"{_LOOPS}.training_epoch_loop:_TrainingEpochLoop"
_CHECKPOINTS = f"{_TRAINER}.connectors.checkpoint_connector:_CheckpointConnector"
_CALLBACKS, _STRATEGIES = "lightning.pytorch.callbacks", "lightning.pytorch.strategies"
_READER = "torch.distributed.checkpoint.filesystem:FileSystemReader"
_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
EXPECTED = (
    Expected(f"{_EPOCH_LOOP}._should_accumulate", "self"),
    Expected(f"{_EPOCH_LOOP}._num_ready_batches_reached", "self"),
    Expected(f"{_EPOCH_LOOP}._should_check_val_fx", "self, data_fetcher"),
    Expected(f"{_EPOCH_LOOP}._broadcast_sigterm_tensor", "self"),
    Expected(
        f"{_EPOCH_LOOP}.advance",
        mentions=("_broadcast_sigterm_tensor", "increment_progress_to_evaluation_end", "update_train_step_metrics"),
    ),
    Expected(f"{_EPOCH_LOOP}.on_advance_end", mentions=("_should_check_val_fx", "_batches_that_stepped")),
    Expected(f"{_EPOCH_LOOP}._on_before_fetch", mentions=("].train_dataloader_next",)),
    Expected(f"{_EPOCH_LOOP}._on_after_fetch", mentions=("].train_dataloader_next",)),
    Expected(f"{_LOOPS}.evaluation_loop:_EvaluationLoop.increment_progress_to_evaluation_end", "self"),
    Expected(f"{_LOOPS}.fit_loop:_FitLoop.advance", mentions=("_data_fetcher",)),
    Expected(
        f"{_TRAINER}.trainer:Trainer.__init__",
        mentions=("_signal_connector", "_checkpoint_connector", "_logger_connector"),
    ),
    Expected(
        f"{_TRAINER}.trainer:Trainer._run",
        mentions=("register_signal_handlers", "_restore_modules_and_callbacks", "restore_training_state"),
    ),
    Expected(f"{_TRAINER}.setup:_init_debugging_flags", mentions=("_val_check_time_interval",)),
    Expected(f"{_TRAINER}.connectors.signal_connector:_SignalConnector.register_signal_handlers", "self"),
    Expected(f"{_CHECKPOINTS}._hpc_resume_path"),
    Expected(f"{_CHECKPOINTS}._parse_ckpt_path", mentions=("_hpc_resume_path", "_find_last_checkpoints")),
    Expected(
        f"{_TRAINER}.connectors.logger_connector:_LoggerConnector.update_train_step_metrics",
        "self",
        mentions=("_first_loop_iter",),
    ),
    Expected(f"{_CALLBACKS}.model_checkpoint:ModelCheckpoint.__init__", mentions=("_last_global_step_saved",)),
    Expected(f"{_CALLBACKS}.model_checkpoint:ModelCheckpoint._find_last_checkpoints", "self, trainer"),
    Expected(f"{_CALLBACKS}.progress.rich_progress:RichProgressBar._get_train_description", "self, current_epoch"),
    Expected("lightning.fabric.utilities.seed:seed_everything", mentions=("PL_GLOBAL_SEED",)),
    Expected(f"{_STRATEGIES}.model_parallel:ModelParallelStrategy.__init__", mentions=("_data_parallel_size",)),
    Expected(f"{_STRATEGIES}.ddp:DDPStrategy.__init__", mentions=("_ddp_kwargs",)),
    Expected(f"{_STRATEGIES}.fsdp:FSDPStrategy.__init__", mentions=("_activation_checkpointing_kwargs",)),
    Expected(f"{_STRATEGIES}.fsdp:FSDPStrategy.load_checkpoint", mentions=("_lazy_load",)),
    Expected("lightning.fabric.utilities.data:_replace_dunder_methods", mentions=("__old", "__old__init__")),
    Expected("torch.amp.grad_scaler:GradScaler.step", mentions=("_step_supports_amp_scaling",)),
    Expected("torch.optim.adam:Adam.__init__", mentions=("_step_supports_amp_scaling",)),
    Expected("torch.fx.traceback:annotate", "annotation_dict"),
    Expected("torch._subclasses.fake_tensor:FakeTensorMode"),
    Expected("torch._ops:OpOverload.__init__", mentions=("_schema",)),
    Expected("torch:UntypedStorage._cdata"),
    Expected(f"{_READER}._get_metadata_path", "self, rank"),
    Expected(f"{_READER}.read_metadata", mentions=("_get_metadata_path",)),
    Expected("torch.utils.tensorboard:SummaryWriter._get_file_writer", "self"),
    Expected("torch.nn:Module._apply", "self, fn, recurse"),
    Expected("torchmetrics:Metric._apply", "self, fn, exclude_state"),
    Expected("jsonargparse._core:ArgumentParser.add_subcommands", mentions=("_subcommands_action",)),
    Expected("jsonargparse._loaders_dumpers:get_yaml_default_loader", mentions=("yaml_default_loader",)),
    Expected("jsonargparse._common:check_import_path", "path"),
    Expected("jsonargparse._util:import_object", mentions=("check_import_path",)),
    Expected("jsonargparse._typehints:adapt_typehints", mentions=("adapt_classes_any",)),
    Expected("jsonargparse._completions:get_all_subclass_paths"),
    Expected("jsonargparse._completions_jsonschema:get_all_subclass_paths"),
    Expected(f"{_ENGINE}._copy_recovery_script", "self, save_path"),
    Expected(f"{_ENGINE}._save_zero_checkpoint", mentions=("checkpoint_engine", "_copy_recovery_script")),
)


def check_private_apis(only_imported: bool = False) -> None:
    """Compare the installed libraries with what this file relies on.

    Args:
        only_imported: Look only at modules that are imported already, which takes a few milliseconds.

    Raises:
        PrivateAPIError: Names each API that is missing or changed, and the library's version.
    """
    problems = []
    for expected in EXPECTED:
        if only_imported and expected.path.partition(":")[0] not in sys.modules:
            continue
        version = _version(expected.library)
        if version and (problem := _problem(expected)):
            problems.append(f"{expected.library} {version}: {problem}")
    if not problems:
        with mark_operations({"probe": True}):
            if operation_marks().get("probe") is not True:
                problems.append(f"torch {torch.__version__}: torch.fx.traceback.annotate does not show in current_meta")
    if problems:
        raise PrivateAPIError(
            f"{'; '.join(problems)}. Install the versions that pyproject.toml allows, or mend {__name__}"
        )


@functools.cache
def _version(library: str) -> str | None:
    """Look up the installed version of a library, once, because each look-up parses a file; None without one."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _problem(expected: Expected) -> str | None:
    module, _, names = expected.path.partition(":")
    found: Any
    try:
        found = importlib.import_module(module)
        for name in names.split("."):
            found = inspect.getattr_static(found, name) if inspect.isclass(found) else getattr(found, name)
    except (ImportError, AttributeError):
        return f"{expected.path} is missing"
    if expected.parameters is not None:
        parameters = ", ".join(inspect.signature(found).parameters)
        if parameters != expected.parameters:
            return f"{expected.path} takes ({parameters}), not ({expected.parameters})"
    code = getattr(inspect.unwrap(found), "__code__", None) if expected.mentions else None
    absent = [word for word in expected.mentions if code is None or word not in _words(code)]
    return f"{expected.path} has no {' and no '.join(absent)}" if absent else None


def _words(code: Any) -> set[str]:
    """Return the names and texts in a function's code, also in functions within it."""
    words = {*code.co_names, *(text for text in code.co_consts if isinstance(text, str))}
    return words.union(*(_words(inner) for inner in code.co_consts if inspect.iscode(inner)))


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = _replace(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _replace(owner: Any, name: str, value: Any) -> Any:
    """Set an attribute and return its old value. It must exist, because setting a renamed one would do nothing."""
    try:
        before = getattr(owner, name)
    except AttributeError:
        raise PrivateAPIError(f"{owner.__name__}.{name} is missing; mend {__name__}, which replaces it") from None
    setattr(owner, name, value)
    return before
