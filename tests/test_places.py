"""Check that commands report places without access, full disks and numbers out of range in one line."""

import pytest

from cola_lightning.cli.app import main

FIT = {
    "--run_dir=/proc/none": "/proc/none",
    "--run_dir=/dev/null/run": "/dev/null",
    "--data.cache_dir=/proc/none": "/proc/none",
    "--seed_everything=-1": "--seed_everything is -1; it must lie between 0 and 4294967295",
    "--seed_everything=99999999999": "--seed_everything is 99999999999; it must lie between 0 and",
    "--model.num_hidden_layers=1000000000": "--model.num_hidden_layers is 1000000000; 10,000 is the most",
    "--data.num_workers=-1": "num_workers is -1; it must be at least 0",
    "--data.batch_size=1000000000000": "32 tokens would take 476,837 GiB of memory",  # ids and labels, 8 bytes each
    "--trainer=3": "Unable to load config",
    '--config={"model": 3}\n': "--model is 3; it must be a mapping of settings",
    "--weights_only=false": "--weights_only is fixed",
}


def one_line(command, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(command)
    shown = capsys.readouterr().err
    assert stop.value.code
    assert "Traceback" not in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("flag", FIT)
def test_fit_says_in_one_line_what_cannot_be(flag, tiny_run, tmp_path, capsys):
    assert FIT[flag] in one_line(["fit", *tiny_run, f"--run_dir={tmp_path / 'run'}", flag], capsys)


@pytest.mark.slow
def test_other_commands_do_so_too(tiny_run, trained_run, corpus, capsys):
    """/dev/full refuses every write, as a full disk does."""
    checkpoint = f"--ckpt_path={trained_run / 'checkpoints' / 'last.ckpt'}"
    assert "/proc/none" in one_line(["predict", *tiny_run, checkpoint, "--run_dir=/proc/none"], capsys)
    for place, said in (("/dev/full", "No space left on device"), ("/proc/none/a.json", "/proc/none")):
        assert said in one_line(["evaluate", str(trained_run), "--text", str(corpus), "--json", place], capsys)
        assert said in one_line(["estimate", *tiny_run, "--json", place], capsys)
    assert "/proc/none" in one_line(["export", str(trained_run), "/proc/none"], capsys)
