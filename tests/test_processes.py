"""Check that processes which a test leaves running are ended with the test process."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.distributed

LEAVES_ONE = """
import time
from pathlib import Path
from tests.processes import Run
run = Run(time.sleep, 1000, ranks=1, folder=Path({folder!r}))
print(run.processes[0].pid)
"""


def test_a_process_that_nobody_waits_for_ends_with_the_test_process(tmp_path):
    program = LEAVES_ONE.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 60  # the server that forked it may need a moment to notice
    while Path("/proc", done.stdout.strip()).exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
