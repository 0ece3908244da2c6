"""Check, in new interpreters, what is imported with Lightning, and that what is deferred is there when it is used."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

DEFERRED = [
    "scipy", "matplotlib", "transformers", "pandas", "datasets", "torch._dynamo", "torchmetrics.functional", "sympy",
    "torch.distributed.tensor", "torch.distributed.checkpoint",
]  # fmt: skip


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_print_config_imports_none_of_the_deferred_libraries():
    code = (
        "import sys\n"
        "from contextlib import suppress\n"
        "from cola_lightning.cli.app import main\n"
        "with suppress(SystemExit): main(['fit', '--config=configs/cola_60m.yaml', '--print_config'])\n"
        f"print('IMPORTED', [name for name in {DEFERRED} if name in sys.modules], len(sys.modules) < 2300)"
    )
    assert run(code).endswith("IMPORTED [] True\n")


@pytest.mark.slow
def test_what_was_deferred_is_there_when_it_is_used():
    """The values are those of a plain import: of torchmetrics, Matplotlib's figure, and torch.compile."""
    code = (
        "import sys, warnings\n"
        "from cola_lightning.light_import import import_lightning, not_compiled\n"
        "import_lightning()\n"
        "import torch, torchmetrics\n"
        "from lightning.pytorch.utilities.compile import OptimizedModule\n"
        "from torchmetrics import Metric\n"
        "assert 'torch._dynamo' not in sys.modules and 'torchmetrics.functional' not in sys.modules\n"
        "assert not isinstance(torch.nn.Linear(1, 1), OptimizedModule)\n"
        # the whole of torchmetrics
        "accuracy = torchmetrics.Accuracy(task='binary')\n"
        "assert isinstance(accuracy, Metric) and torchmetrics.Metric is Metric\n"
        "assert accuracy(torch.tensor([1, 0, 1, 1]), torch.tensor([1, 0, 0, 1])) == 0.75\n"
        "from torchmetrics.functional import accuracy as function\n"
        "figure, axes = accuracy.plot()\n"
        "assert type(figure).__module__ == 'matplotlib.figure' and sys.modules['torchmetrics.utilities.plot'].plt\n"
        # the compiler
        "class Network(torch.nn.Module):\n"
        "    def forward(self, x): return self.untraced(x) * 2\n"
        "    @not_compiled\n"
        "    def untraced(self, x):\n"
        "        assert not torch.compiler.is_compiling()\n"
        "        return x + 1\n"
        "assert Network()(torch.ones(1)) == 4\n"
        "compiled = torch.compile(Network(), backend='eager')\n"
        "assert isinstance(compiled, OptimizedModule) and compiled(torch.ones(1)) == 4\n"
        "torch._dynamo.reset()\n"
        "whole = torch.compile(Network(), backend='eager', fullgraph=True)\n"
        "try: whole(torch.ones(1))\n"
        "except torch._dynamo.exc.Unsupported as error: assert 'disable' in str(error)\n"
        "else: raise AssertionError('it was traced')\n"
        # Lightning's own functions that the compiler must not trace
        "from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection\n"
        "results = _ResultCollection(training=True)\n"
        "results.log('training_step', 'loss', torch.tensor(3.0), on_step=True, on_epoch=False, batch_size=1)\n"
        "assert results.metrics(on_step=True)['log'] == {'loss': 3.0}\n"
    )
    run(code)


def test_a_library_that_is_imported_already_stays():
    import torchmetrics

    from cola_lightning.light_import import import_lightning

    import_lightning()
    assert sys.modules["torchmetrics"] is torchmetrics


def test_the_package_itself_imports_nothing():
    """Python shows a traceback of what is imported when Ctrl-C comes before ``__main__``, which runs next."""
    code = "import sys; before = set(sys.modules); import cola_lightning; print(set(sys.modules) - before)"
    assert run(code) == "{'cola_lightning'}\n"
