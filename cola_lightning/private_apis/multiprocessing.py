"""A private API of Python's multiprocessing."""

import multiprocessing.queues
from collections.abc import Callable
from typing import Any

from cola_lightning.private_apis.expected import replace_attribute


def on_unsendable_item(act: Callable[[Exception, Any], None]) -> None:
    """Call ``act(error, item)`` in this process if a queue cannot send an item.

    By default the item is dropped with a traceback, and the reader waits for it without end.
    """
    replace_attribute(multiprocessing.queues.Queue, "_on_queue_feeder_error", staticmethod(act))
