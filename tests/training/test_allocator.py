"""Memory that a step frees stays with the process."""

import os
import subprocess
import sys

import pytest

from cola_lightning.training import module
from tests.conftest import REPOSITORY
from tests.training.test_module import tiny, trainer

FAULTS = """
import resource, sys
from cola_lightning.training.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(64 * 2**20).decode("latin1")
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize(("how", "variables", "kept"), [
    ("kept", {}, True), ("default", {}, False), ("kept", {"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
])  # fmt: skip
def test_memory_that_was_freed_needs_no_new_pages(how, variables, kept):
    """64 MiB, allocated a second time; a page of 4 KiB that the kernel has to give again is one fault."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONMALLOC": "malloc", **variables}
    run = subprocess.run(
        [sys.executable, "-c", FAULTS, how], env=environment, capture_output=True, text=True, check=True
    )
    faults = int(run.stdout)
    assert faults < 1000 if kept else faults > 15000


def test_a_network_on_a_processor_keeps_it(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "keep_freed_memory", lambda: calls.append("kept"))
    model = tiny()
    model.configure_model()  # without a trainer, as inference does
    assert not calls
    model.trainer = trainer()
    model.configure_model()
    assert calls
