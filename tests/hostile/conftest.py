"""Code that a hostile file would run, and the trace that it would leave."""

import os
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def trace(tmp_path, monkeypatch) -> Path:
    """Return the file that hostile code makes. The working directory has a module that makes it when imported."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    trace = tmp_path / "trace"
    Path("evil_module.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil:\n    pass\n")
    Path("text.txt").write_text("the law of the land")
    Path("evil").write_text(popen(trace, as_text=True))
    yield trace
    sys.modules.pop("evil_module", None)
    assert not trace.exists(), "code has run"


def popen(trace: Path, as_text: bool = False):
    spec = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(trace)]}}
    return f"class_path: subprocess.Popen\ninit_args: {{args: [touch, {trace}]}}\n" if as_text else spec


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


def evil_file(folder: Path, trace: Path) -> Path:
    torch.save({"state_dict": {}, "x": Evil(trace)}, folder / "evil.ckpt")
    return folder / "evil.ckpt"
