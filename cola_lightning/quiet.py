"""Hide what libraries print about themselves, so that the output of a run is about the run.

Warnings that ask for action stay. ``cola_lightning.callbacks.run_summary`` prints what of these messages matters: the
devices, the seed, the last step.
"""

import logging
import os
import re
import sys
import warnings

HIDDEN_MESSAGES = re.compile(
    r"(GPU|TPU|HPU) available: "  # the summary of the run names the devices
    r"|💡 Tip: "  # advertising
    r"|Seed set to \d"
    r"|`Trainer\.fit` stopped: "
    r"|LOCAL_RANK: \d+ - CUDA_VISIBLE_DEVICES"
    r"|Initializing distributed: "  # from each rank
    r"|-{20,}\ndistributed_backend=",
)
"""Beginnings of messages that Lightning logs."""
HIDDEN_WARNINGS = (
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"The number of training batches .* is smaller than the logging interval",  # the summary of the run says it
)
"""Beginnings of warnings about other libraries' code, which a user cannot change, and of one said in other words."""


def hide_library_messages() -> None:
    """Hide advertising, deprecations of others, and messages that the summary of a run repeats; in this process.

    The bars of ``datasets`` are hidden, because one run draws ten of them. Lines say what is read and tokenized.
    """
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if is_wanted not in handler.filters:
                handler.addFilter(is_wanted)
    for text in HIDDEN_WARNINGS:
        warnings.filterwarnings("ignore", text)
    # torch.compile warns that it does not cache a layer with selective checkpointing, in terms of torch's internals.
    logging.getLogger("torch._functorch._aot_autograd.autograd_cache").setLevel(logging.ERROR)
    # It tells each of its own attempts to reach the hub in two lines. cola_lightning.data.retry tells them in one.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read when datasets is imported
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()


def is_wanted(record: logging.LogRecord) -> bool:
    """Return whether a message of Lightning is about the run."""
    return not HIDDEN_MESSAGES.match(record.getMessage())
