"""Run the examples of docs/api.md in their order, and import every name that it calls stable."""

import importlib
import re
import shutil

import pytest
import torch
from tokenizers import Tokenizer

from cola_lightning.training.module import LanguageModel
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "api.md").read_text()
TABLE = re.findall(r"^\| `(cola_lightning[\w.]*)` \| (.+) \|$", PAGE, re.MULTILINE)


def test_every_stable_name_exists_and_says_what_it_is():
    names = [(module, name) for module, cell in TABLE for name in re.findall(r"`(\w+)`", cell)]
    assert len(names) > 50
    for module, name in names:
        found = getattr(importlib.import_module(module), name)
        assert found.__doc__ or name == "MakeProjection", name  # a type, explained in a comment


@pytest.mark.slow
def test_the_examples_of_the_page_run(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(corpus, "notes")
    space = {"__name__": "page"}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)):
        exec(compile(block, f"docs/api.md, example {number}", "exec"), space)
    assert isinstance(space["model"], LanguageModel)
    assert space["trainer"].global_step == 4
    assert space["longer"].shape == (1, 13)
    assert torch.equal(space["again"](space["ids"]), space["logits"])
    assert all(parameter.grad is not None for parameter in space["plain"].parameters())
    space["other_data"].prepare_data()
    space["other_data"].setup("validate")
    assert space["other_data"].tokenizer.fast.to_str() == Tokenizer.from_file("mine.json").to_str()
    other = space["other_model"]
    other.configure_model()
    z, gate = torch.randn(2, 8), other.network.model.layers[0].mlp.gate_proj
    assert torch.equal(gate.expand(z), torch.tanh(z) @ gate.B.weight.T)
