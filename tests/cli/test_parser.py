"""Type what cannot be parsed: the real command line reports place, value and fix in one line, and nothing else."""

import pytest

from cola_lightning.cli.app import main
from cola_lightning.cli.lightning_cli import CLI, training_parser
from cola_lightning.cli.parser import explain
from cola_lightning.private_apis.jsonargparse import commands_of
from tests.conftest import REPOSITORY

QUICKSTART = str(REPOSITORY / "configs" / "quickstart.yaml")
NAMED = "name one of those that --help lists, or any by its import path"
STEPS = "(did you mean --trainer.max_steps or --trainer.max_time?); --help lists them"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--trainer.max_stepz=3"], f"--trainer.max_stepz is not an option {STEPS}"),
        (["--checkpoint.foo", "3"],
         "--checkpoint.foo is not an option (did you mean --checkpoint or --checkpoint.keep?); --help lists them"),
        (["more"], "more is not an option; the names of options begin with --"),
        (["more.yaml"],
         "more.yaml is not an option (did you mean --config more.yaml?); the names of options begin with --"),
        (["--lr=3"], "--lr is not an option (did you mean --model.optimizer.lr?); --help lists them"),
        (["--model.learning_rate=3"],
         "--model.learning_rate is not an option (did you mean --model.optimizer.lr?); --help lists them"),
        (["--batch_size=3"], "--batch_size is not an option (did you mean --data.batch_size?); --help lists them"),
        (["--trainer.max_steps="], "--trainer.max_steps is empty; it must be a whole number"),
        (["--config="], "--config is empty; name a YAML file"),
        (["--config=no/such.yaml"], "--config no/such.yaml does not exist; name a YAML file"),
        (["--config=/"], "--config / is a directory; name a YAML file"),
        (["--config=configs/quickstrat.yaml"],
         "--config configs/quickstrat.yaml does not exist (did you mean quickstart.yaml?); name a YAML file"),
        (["--config=fast"], "--config fast does not exist (did you mean configs/fast.yaml?); name a YAML file"),
        (["--run_dir="], "--run_dir is empty; name a directory, or leave the option out"),
        ([f"--run_dir={QUICKSTART}/a/b"],
         f"--run_dir {QUICKSTART}/a/b cannot be made, because {QUICKSTART} is a file; name a directory, which need not "
         "exist yet"),
        (["--checkpoint.dirpath= "], "--checkpoint.dirpath is empty; name a directory, or leave the option out"),
        (["--model.vocab_size"], "argument --model.vocab_size: expected one argument"),
        (["--trainer.max_steps=many"], "--trainer.max_steps is many; it must be a whole number"),
        (["--model.compile=maybe"], "--model.compile is maybe; it must be true or false"),
        (["--model.optimizer=AdamW", "--model.optimizer.lr=fast"], "--model.optimizer.lr is fast; it must be a number"),
        (["--trainer.precision=bf32"],
         "--trainer.precision is bf32; it must be a whole number, transformer-engine, transformer-engine-float16, "
         "16-true, 16-mixed, bf16-true, bf16-mixed, 32-true, 64-true, 64, 32, 16, bf16 or null"),
        (["--trainer.strategy=fsdp3"],
         "--trainer.strategy fsdp3 is unknown (did you mean fsdp or fsdp2?); take auto, ddp, fsdp, fsdp2, "
         "deepspeed_stage_1, 2 or 3, or deepspeed_stage_2_offload or 3_offload"),
        (["--trainer.accelerator=cpu", "--trainer.devices=x"],
         "`devices` selected with `CPUAccelerator` should be an int > 0."),
        (["--data.batch_size=two"], "--data.batch_size is two; it must be a whole number"),
        (["--data=Text"], f"--data is Text, a class that cannot be found; {NAMED}"),
        (["--model.projection=Cola2"],
         f"--model.projection is Cola2, a class that cannot be found (did you mean CoLA or CoLAM?); {NAMED}"),
        (["--model.optimizer=torch.optim.AdamWW"],
         f"--model.optimizer is torch.optim.AdamWW, a class that cannot be found (did you mean AdamW or Adam?); "
         f"{NAMED}"),
        (["--model.optimizer=bitsandbyte.optim.AdamW8bit"],
         "--model.optimizer is bitsandbyte.optim.AdamW8bit, but there is no package bitsandbyte; check the name, or "
         "install the package"),
        (["--model.projection.rnk=3"], "--model.projection.rnk: CoLA has no option rnk (did you mean rank?)"),
        (["--model.projection.x=3"], "--model.projection.x: CoLA has no option x; it has rank"),
        (["--model.schedule=CosineAnnealingLR", "--model.schedule.T_maxx=3"],
         "--model.schedule.T_maxx: CosineAnnealingLR has no option T_maxx (did you mean T_max?)"),
        (["--model.schedule=CosineAnnealingLR", "--model.schedule.T_max=soon"],
         "--model.schedule.T_max is soon; it must be a whole number or null"),
        (["--model.schedule=ExponentialLR"],
         "--model.schedule.gamma must be given, because ExponentialLR needs it"),
        (["--model.schedule=torch.optim.lr_scheduler.ReduceLROnPlateau"],
         "--model.schedule ReduceLROnPlateau follows a metric; name a schedule that follows the step, such as "
         "WarmupCosine or CosineAnnealingLR"),
        (["--trainer.callbacks+=CoLAM", "--trainer.callbacks.keep=all"],
         "--trainer.callbacks.keep is all; it must be residual_and_latents, attention_and_mlp_latents, latents or "
         "block_input"),
        (["--trainer.callbacks=[{class_path: CoLAM, init_args: {kep: latents}}]"],
         "--trainer.callbacks.kep: CoLAM has no option kep (did you mean keep?)"),
    ],
)  # fmt: skip
def test_one_line_says_what_and_where_and_how_to_mend_it(flags, line, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit, match="2"):
        main(["fit", f"--config={QUICKSTART}", *flags])
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("trainer: {max_step: 3}", f"--trainer.max_step is not an option {STEPS}"),
        ("model: {hidden_size: wide}", "--model.hidden_size is wide; it must be a whole number"),
    ],
)  # fmt: skip
def test_in_files_too(content, line, capsys, tmp_path):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main(["fit", f"--config={QUICKSTART}", f"--config={tmp_path / 'run.yaml'}"])
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(
    ("typed", "line"),
    [(["fitt"], "fitt is not a command (did you mean fit?); --help lists them"),
     ([], "no command is given; --help lists them"),
     (["train"], "train is not a command (did you mean fit?); --help lists them"),
     (["fit"], "--data must be given, on the command line or in a config; --help lists the options"),
     (["estimate"], "--data must be given, on the command line or in a config; --help lists the options"),
     (["prepare"],
      "--source.path and --folder must be given, on the command line or in a config; --help lists the options"),
     (["export", "model", "folder", "--max_shard_sze=1"],
      "--max_shard_sze is not an option (did you mean --max_shard_size?); --help lists them"),
     (["factorize", "model", "folder", "--projection=LoRA"], "--projection.rank must be given, because LoRA needs it"),
     (["compare", "--jobs=many"], "--jobs is many; it must be a whole number")],
)  # fmt: skip
def test_commands(typed, line, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(typed)
    assert capsys.readouterr().err == f"error: {line}\n"


def test_a_command_makes_no_parser_but_its_own(tiny_run, capsys, monkeypatch):
    made = []
    init = CLI.init_parser
    monkeypatch.setattr(
        CLI, "init_parser", lambda self, **settings: made.append(settings.get("usage")) or init(self, **settings)
    )
    with pytest.raises(SystemExit):
        main(["fit", *tiny_run, "--print_config"])
    assert [usage.split()[1] for usage in made if usage] == ["fit"]
    assert sorted(commands_of(training_parser())) == ["fit", "predict", "test", "validate"]


def test_of_unknown_kinds_nothing_is_left_out():
    assert explain("Something\n  quite else:\n    3") == "Something quite else: 3"
    assert explain('Parser key "model.x":\n  This is\n  new') == "--model.x: This is new"
