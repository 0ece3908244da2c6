import json
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from cola_lightning.benchmark import ExternalModel, PackageModel
from cola_lightning.benchmark.clock import Clock, count_processor_time
from cola_lightning.cli.app import main
from cola_lightning.cli.commands.benchmark import parse
from cola_lightning.cli.lightning_cli import CLI
from cola_lightning.errors import InputError
from cola_lightning.models.generation_step import CompiledStep
from tests.conftest import REPOSITORY


@pytest.fixture
def flags(tiny_run):
    return [*(flag for flag in tiny_run if "data.paths" not in flag), "--data.paths=[unused]"]


def run(folder, *args):
    main(["benchmark", f"--json={folder / 'b.json'}", "--rounds=2", "--steps=1", "--warmup=0", *args])
    return json.loads((folder / "b.json").read_text())


@pytest.mark.slow
def test_a_step_is_counted_and_timed(flags, tmp_path, capsys):
    result = run(tmp_path, *flags, "--trainer.precision=bf16-true", "--trainer.callbacks+=CoLAM")
    [subject] = result["subjects"]
    assert subject["parameters"] == 300 * 32 * 2 + 5 * 32 + 2 * 8 * (11 * 32 + 3 * 48)
    assert subject["saved_hidden_states_per_layer"] == pytest.approx(1 + 7 * 8 / 32)
    # Recomputation is in the hardware's FLOPs, and not in the model's.
    assert subject["flops_step"] > subject["flops_model"] == 3 * subject["flops_forward"]
    assert subject["parameter_bytes"] == subject["gradient_bytes"] == 2 * subject["parameters"]
    assert subject["optimizer_state_bytes"] == pytest.approx(4 * subject["parameters"], rel=0.01)
    held = subject["parameter_bytes"] + subject["optimizer_state_bytes"] + subject["gradient_bytes"]
    logits = 4 * 32 * 300 * 4
    assert held + logits < subject["counted_peak_bytes"] < held + 10 * logits
    assert len(subject["tokens_per_second"]) == 2
    parts = ("data", "forward", "backward", "optimizer")
    assert all(subject["seconds"][part] >= 0 for part in parts)
    assert subject["seconds"]["backward"] < subject["seconds"]["step"] < 60
    assert subject["mfu"] == pytest.approx(
        subject["flops_model"] / subject["seconds"]["step"] / result["setting"]["peak_tflops"] / 1e12
    )
    assert subject["peak_memory_bytes"] is None
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.slow
def test_networks_of_this_package_and_of_others_are_measured_in_turns(flags, tmp_path):
    overlay = REPOSITORY / "configs" / "method" / "cola_m.yaml"
    peers = ["--peer=tests.benchmark.peers:same", "--peer=tests.benchmark.peers:wrapped"]
    result = run(tmp_path, *flags, f"--against={overlay}", *peers)
    plain, cola_m, same, wrapped = result["subjects"]
    assert [ratio["name"] for ratio in result["ratios"]] == [
        f"fit's defaults ÷ {subject['name']}" for subject in (cola_m, same, wrapped)
    ]
    for other in (same, wrapped):
        assert other["parameters"] == plain["parameters"]
        assert other["flops_step"] == plain["flops_step"]
        assert other["flops_model"] == plain["flops_model"]
        assert other["counted_peak_bytes"] == pytest.approx(plain["counted_peak_bytes"], rel=0.1)
    assert cola_m["flops_model"] == plain["flops_model"] < plain["flops_step"] < cola_m["flops_step"]
    assert cola_m["saved_hidden_states_per_layer"] < plain["saved_hidden_states_per_layer"] / 5


@pytest.mark.slow
def test_a_peer_learns_as_our_network_does(flags):
    cli = CLI([*flags, "--trainer.precision=64-true"], run=False)
    own = PackageModel("own", cli.trainer, cli.model, cli.datamodule)
    peer = ExternalModel("tests.benchmark.peers:same", own)
    for subject in (own, peer):
        subject.build()
    peer.network.load_state_dict(cli.model.network.state_dict())
    peer.batch = own.batch
    for _ in range(3):
        assert own.forward().item() == pytest.approx(peer.forward().item(), abs=1e-10)
        own.step()
        peer.step()
    for ours, theirs in zip(cli.model.network.parameters(), peer.network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_traces_are_written_in_chromes_format(flags, tmp_path):
    run(tmp_path, *flags, f"--profile={tmp_path / 'traces'}")
    [file] = (tmp_path / "traces").iterdir()
    assert file.name.endswith(".pt.trace.json")
    names = {event["name"] for event in json.loads(file.read_text())["traceEvents"] if "name" in event}
    assert {"step", "aten::mm", "aten::scaled_dot_product_attention"} <= names


@pytest.mark.slow
def test_generation_is_counted_and_timed(flags, tmp_path, capsys):
    result = run(tmp_path, *flags, "--generate=5", "--data.batch_size=2")
    [subject] = result["subjects"]
    assert subject["prepared"] == "plain" in capsys.readouterr().out
    assert len(subject["tokens_per_second"]) == 2
    assert min(subject["tokens_per_second"]) > 0
    cache = 2 * 2 * 2 * (32 + 5) * 32 * 4  # keys and values, two layers, two rows
    assert subject["counted_peak_bytes"] > subject["parameter_bytes"] + cache
    assert "flops_step" not in subject


@pytest.mark.slow
def test_generation_is_prepared_as_the_command_generate_does_and_compiled_before_it_is_timed(
    flags, tmp_path, monkeypatch, capsys
):
    compiled, now = [], [0.0]

    def backend(graph, inputs):
        compiled.append(graph)
        now[0] += 1000
        return graph.forward

    def perf_counter():
        now[0] += 1
        return now[0]

    monkeypatch.setattr("cola_lightning.inference.prepare.CompiledStep", partial(CompiledStep, backend=backend))
    monkeypatch.setattr("cola_lightning.benchmark.generating.time", SimpleNamespace(perf_counter=perf_counter))
    result = run(tmp_path, *flags, "--generate=5", "--data.batch_size=1", "--compile", "--int8", "--model.compile=true")
    [subject] = result["subjects"]
    assert subject["prepared"] == "int8, compiled" in capsys.readouterr().out
    assert len(compiled) == 2  # a layer, and the head
    assert subject["tokens_per_second"] == [4.0, 4.0]  # four tokens between two readings of the clock
    matrices = 300 * 32 * 2 + 2 * 8 * (11 * 32 + 3 * 48)
    rows = 300 * 2 + 2 * (7 * 8 + 5 * 32 + 2 * 48)
    assert subject["parameter_bytes"] == matrices + 4 * (rows + 5 * 32)  # factors of the rows, and norms, in float32


@pytest.mark.slow
def test_generation_is_measured_with_methods_merged(flags, tmp_path):
    result = run(tmp_path, *flags, "--generate=2", "--model.projection=LoRA", "--model.projection.rank=8")
    assert result["subjects"][0]["parameters"] == 300 * 32 * 2 + 5 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48)


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (4, "error: --compile is for one row, and --data.batch_size is 4; leave it out, or add --data.batch_size 1"),
        (1, "error: --compile needs a C++ compiler, and there is no no-compiler"),
    ],
)
def test_generation_that_cannot_be_compiled_is_refused(rows, line, flags, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-compiler" if rows == 1 else sys.executable)
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", *flags, "--generate=5", "--compile", f"--data.batch_size={rows}"])
    assert line in capsys.readouterr().err


def test_a_clock_gives_the_time_between_marks():
    clock = Clock(torch.device("cpu"))
    clock.marks = [("", 1.0), ("a", 1.5), ("b", 3.5), ("a", 4.0)]
    assert clock.read() == [("a", 0.5), ("b", 2.0), ("a", 0.5)]
    assert clock.read() == []


def test_processor_time_does_not_grow_while_a_process_waits(monkeypatch):
    threads = []
    monkeypatch.setattr(time, "perf_counter", time.perf_counter)  # so that it is restored after the test
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    count_processor_time()
    clock = Clock(torch.device("cpu"))
    clock.mark("")
    time.sleep(0.5)
    clock.mark("a")
    [(_, seconds)] = clock.read()
    assert seconds < 0.25
    assert threads == [1]


def test_flags_beside_the_configs_apply_to_every_network():
    options, subjects = parse(["--config=x/a.yaml", "-c", "b.yaml", "--against=c.yaml,b.yaml", "--model.compile=true"])
    assert list(subjects) == ["a+b", "c+b"]
    assert subjects["c+b"][:3] == ["--config=c.yaml", "--config=b.yaml", "--model.compile=true"]
    assert options.against == ["c.yaml,b.yaml"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rounds=0"], "--rounds is 0; it must be at least 1"),
        (["--generate=4", "--peer=a:b"], "leave --peer and --profile out"),
        (["--int8"], "--int8 and --compile prepare a network for generation; add --generate N"),
        (["--compile"], "--int8 and --compile prepare a network for generation; add --generate N"),
    ],
)
def test_what_cannot_be_is_refused(args, message):
    with pytest.raises(InputError, match=message):
        parse(args)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere:network", r"--peer nowhere:network is not to be had \(No module named"),
        ("tests.benchmark.peers:missing", "is not to be had .* give it as module:callable"),
        ("tests.benchmark.peers:nothing", "returned a str; it must return a torch module"),
    ],
)
def test_a_peer_that_is_no_module_is_refused(path, message, flags):
    cli = CLI(flags, run=False)
    with pytest.raises(InputError, match=message):
        ExternalModel(path, PackageModel("own", cli.trainer, cli.model, cli.datamodule)).build()
