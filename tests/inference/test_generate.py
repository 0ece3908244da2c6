"""The command ``generate``, and what it decides beyond drawing tokens."""

import os
import re
import sys

import pytest
import torch

from cola_lightning.cli.app import main
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import UnusableModelError
from cola_lightning.inference.generate import Continuation, _lines, continue_texts
from cola_lightning.models import FullRank
from tests.conftest import tiny_llama
from tests.data.test_tokenizer import t5_like


class Scripted(torch.nn.Module):
    """A head whose likeliest next ids are those of a text, whatever came before."""

    def __init__(self, network, scripts):
        super().__init__()
        self.weight, self.scripts, self.step = network.lm_head.weight, scripts, 0

    def forward(self, x):
        logits = torch.zeros(*x.shape[:-1], 300)
        for row, script in enumerate(self.scripts):
            logits[row, ..., script[self.step]] = 1
        self.step += 1
        return logits


@pytest.fixture(scope="module")
def tokenizer(texts):
    return Tokenizer.train(iter(texts), 300)


def say(tokenizer, prompts, texts, stops=()):
    """All that comes of prompts when the network is bent on going on with ``texts``."""
    scripts = [tokenizer.encode([text])[0] for text in texts]
    length = max(map(len, scripts))
    network = tiny_llama(FullRank).eval()
    network.lm_head = Scripted(network, [ids + ids[-1:] * (length - len(ids)) for ids in scripts])
    options = {"max_new_tokens": length, "temperature": 0}
    return list(continue_texts(network, tokenizer, prompts, list(stops), **options))


def test_a_document_ends_where_its_id_comes(tokenizer):
    *_, texts = say(tokenizer, ["the people", "war"], [" of the nation", " upon"])
    assert texts == [" of the nation", " upon"]


def test_a_stop_ends_its_row_alone_and_is_left_out(tokenizer):
    *_, texts = say(tokenizer, ["a", "b"], [" year. Next", " no end"], stops=[". ", "###"])
    assert texts == [" year", " no end"]


def test_one_prompt_is_written_as_it_comes_but_nothing_is_taken_back(tokenizer, monkeypatch, capsys, trained_run):
    steps = say(tokenizer, ["a"], [" 漢#字##!"], stops=["##"])
    assert any("\N{REPLACEMENT CHARACTER}" in texts[0] for texts in steps)  # a letter of which bytes are missing
    monkeypatch.setattr("cola_lightning.inference.generate.continue_texts", lambda *args, **options: iter(steps))
    written = []
    monkeypatch.setattr("builtins.print", lambda text, **_: written.append(text))
    main(["generate", str(trained_run), "--prompt=a", "--stop=##"])
    assert len([text for text in written if text]) > 4
    assert "".join(written) == "a 漢#字"


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_a_text_decoded_token_by_token_is_that_of_all_tokens(kind, tokenizer, tmp_path):
    chosen = tokenizer if kind == "bytes" else Tokenizer.load(str(t5_like(tmp_path / "pieces")))
    (begun,) = chosen.encode(["a 漢" if kind == "bytes" else "ab c"])
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(chosen.vocab_size, (300,), generator=draw).tolist()  # bytes that make no letters, too
    ids = [id for id in ids if id not in chosen.stop_ids] + (chosen.encode(["漢字 naïve"])[0][:-1] * 3)
    continuation = Continuation(chosen, begun[:-1], [])
    whole = len(chosen.decode(begun[:-1]))
    for count, id in enumerate(ids, 1):
        continuation.append(id)
        assert continuation.text == chosen.decode(begun[:-1] + ids[:count])[whole:]


def test_the_time_to_decode_a_token_does_not_grow_with_the_text(tokenizer, monkeypatch):
    decoded = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    continuation = Continuation(tokenizer, tokenizer.encode(["the people"])[0][:-1], ["##"])
    for id in tokenizer.encode(["of the nation " * 50])[0][:-1]:
        continuation.append(id)
    assert len(decoded) > 200
    assert max(decoded[20:]) <= 4


def test_from_run_and_folder_alike(trained_run, tmp_path, capsys):
    prompts = ["--prompt=the people", "--prompt=congress upon the year"]
    main(["export", str(trained_run), str(tmp_path / "folder")])
    capsys.readouterr()
    shown = []
    for model in (trained_run, tmp_path / "folder"):
        main(["generate", str(model), *prompts, "--max_new_tokens=8", "--seed=3", "--top_p=0.9", "--top_k=40"])
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert re.fullmatch(r"the people.+\n\ncongress upon the year.+\n", shown[0], re.DOTALL)
    (tmp_path / "prompts.txt").write_text("the people\n\ncongress upon the year\n")
    main(["generate", str(trained_run), f"--file={tmp_path / 'prompts.txt'}", "--max_new_tokens=8", "--seed=3",
          "--top_p=0.9", "--top_k=40"])  # fmt: skip
    assert capsys.readouterr().out == shown[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no prompt; give --prompt TEXT, or --file with one on each line"),
        (["--prompt="], "the prompt '' holds no token"),
        (["--prompt=a", "--temperature=-1"], "--temperature is -1.0; it must be at least 0"),
        (["--prompt=a", "--max_new_tokens=0"], "--max_new_tokens is 0"),
        (["--prompt=a", "--top_k=0"], "--top_k is 0"),
        (["--prompt=a", "--top_p=1.5"], "--top_p is 1.5; it must lie above 0 and not above 1"),
        (["--file=gone.txt"], "--file gone.txt cannot be read"),
        (["--prompt=a", "--temperature=nan"], "--temperature is nan; it must be a number of at least 0"),
        (["--prompt=a", "--temperature=inf"], "--temperature is inf; it must be a number of at least 0"),
        (["--prompt=a", "--top_p=nan"], "--top_p is nan"),
        (["--prompt=a", f"--seed={2**64}"], "--seed is 18446744073709551616; it must lie between -2^63 and 2^64 - 1"),
        (["--prompt=a\udcff"], r"--prompt 'a\udcff' is not UTF-8"),
        (["--prompt=a", "--stop=\udcff"], r"--stop '\udcff' is not UTF-8"),
        (["--prompt=a", "--stop="], "--stop is empty"),
        (["--prompt=a", "--max_new_tokens=x"], "argument --max_new_tokens: invalid int value: 'x'; cola_lightning gen"),
        (["--prompt=a", "--topk=3"], "--topk is not an option (did you mean --top_k"),
        (["--prompt=a", "--device=abacus"], "--device abacus cannot be used"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, trained_run, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", str(trained_run), *arguments])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_tiny_temperature_takes_the_likeliest(trained_run, capsys):
    shown = []
    for temperature in ("0", "1e-40", "1e-300"):
        main(["generate", str(trained_run), "--prompt=the", "--max_new_tokens=9", f"--temperature={temperature}"])
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2]


def test_prompts_end_where_lines_end_in_an_editor(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffone\u2028still one\r\n\ntwo\n".encode())
    assert _lines(str(tmp_path / "prompts.txt")) == ["one\u2028still one", "two"]


def test_letters_that_a_terminal_lacks_are_spelt_out(trained_run, tmp_path, monkeypatch):
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        main(["generate", str(trained_run), "--prompt=naïve", "--max_new_tokens=2"])
    assert (tmp_path / "out").read_text().startswith(r"na\xefve")


def test_a_reader_that_leaves_ends_it_in_one_line(trained_run, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit, match="141"):
            main(["generate", str(trained_run), "--prompt=the", "--max_new_tokens=2"])
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["error: standard output was closed before all was written, as by '| head'"]


def test_logits_that_are_no_numbers_are_said(tokenizer):
    network = tiny_llama(FullRank).eval()
    torch.nn.init.constant_(network.lm_head.weight, float("inf"))
    with pytest.raises(UnusableModelError, match="the logits are NaN"):
        list(continue_texts(network, tokenizer, ["a"], [], max_new_tokens=2))
