"""Run the README's two commands as they are written, in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

# Variables that a test run sets and a user's shell does not. Lightning limits threads after a parallel run.
FOREIGN = ("PYTEST", "PYTHONPATH", "COV", "OMP_", "PL_")
COMMANDS = re.findall(r"^python3 -m venv .*$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Copy the files of a clone, with an environment that finds this one's packages, so that pip fetches little."""
    folder = tmp_path_factory.mktemp("clone")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    files = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    subprocess.run([sys.executable, "-m", "venv", folder / ".venv"], check=True)
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / ".venv" / "lib" / python / "site-packages"
    (packages / "outer.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def run(command, folder, **environment):
    # The first python3 on the path is the tests' own, and the cache is empty, as a new user's.
    binaries = folder / "bin"
    binaries.mkdir(exist_ok=True)
    if not (binaries / "python3").exists():
        (binaries / "python3").symlink_to(sys.executable)
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)},
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(folder / "cache"),
        **environment,
    }
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_readme_has_the_two_commands():
    assert len(COMMANDS) == 2
    assert "configs/quickstart.yaml" in COMMANDS[0]
    assert COMMANDS[1].endswith("pytest")


def test_the_test_command_finds_the_tests(clone):
    shown = run(COMMANDS[1], clone, PYTEST_ADDOPTS="--collect-only -q")
    assert "tests/test_readme.py::test_the_quick_start" in shown


def test_the_quick_start_learns_english(clone):
    shown = run(COMMANDS[0], clone)
    perplexity = {
        name: float(re.search(rf"{name} +([\d,.]+)", shown)[1].replace(",", ""))
        for name in ("uniform over the vocabulary", "unigram", "this model")
    }
    assert perplexity["uniform over the vocabulary"] == 4096
    assert perplexity["this model"] < perplexity["unigram"] / 4
    assert re.search(
        r"The model continues 'The people of the United States':\n +The people of the United States\W+\w+", shown
    )
    events = EventAccumulator(str(clone / "runs" / "quickstart")).Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(9, 1000, 10))
    assert [event.step for event in events.Scalars("val/perplexity")] == [249, 499, 749, 999]
    assert losses[-1].value < losses[0].value - 2
    assert "picture of the run: " in shown
    assert imread(clone / "runs" / "quickstart" / "training.png").shape[1] == 750
