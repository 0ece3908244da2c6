"""Use models with their own tokenizer: a beginning id, special tokens, several end ids, and a chat template."""

import json
import math

import pytest
import torch
from tokenizers import AddedToken, decoders, models, normalizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cola_lightning.cli.app import main
from cola_lightning.data.folder_tokenizer import FolderTokenizer
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from cola_lightning.inference.load import load_model_for_inference
from tests.inference.test_evaluate import needs_lm_eval, write_task

SPECIAL = ["<|begin|>", "<|user|>", "<|turn|>"]
CHAT = "{% for message in messages %}<|user|>{{ message.content }}<|turn|>{% endfor %}"


@pytest.fixture(scope="module")
def llama(texts, tmp_path_factory):
    """Write a model with such a tokenizer, as transformers does."""
    folder = tmp_path_factory.mktemp("models") / "chatty"
    fast = Tokenizer.train(iter(texts), 290).fast
    fast.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    begin, turn = fast.token_to_id("<|begin|>"), fast.token_to_id("<|turn|>")
    fast.post_processor = TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", begin)]
    )
    torch.manual_seed(1)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "initializer_range": 0.3}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(bos_token_id=begin, eos_token_id=[1, turn], **sizes))
    model.generation_config.eos_token_id = [1, turn]
    with torch.no_grad():
        model.lm_head.weight[turn] *= 4  # so that it is generated soon
    model.save_pretrained(folder)
    fast.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def theirs(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": False, "add_eos_token": True}])  # tokenizer.json decides
def test_ids_are_those_of_transformers(settings, llama, tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_text((llama / file).read_text())
    content = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content | settings))
    ours, other = FolderTokenizer.open(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    texts = ["the nation", "<|user|>war</s> upon<|turn|>", " naïve 漢字\n"]
    for text, ids in zip(texts, ours.encode(texts), strict=True):
        assert ids == [*other(text).input_ids, 1]
        assert ours.decode(ids) == other.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("legacy", [None, False, True])
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_a_tokenizer_like_llama_2s_gives_the_ids_of_transformers(kind, legacy, texts, tmp_path):
    fast = FastTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *alphabet], show_progress=False)
    fast.train_from_iterator(texts, trainer)
    content = json.loads(fast.to_str())
    content["added_tokens"] = content["added_tokens"][: len(special)]
    fast = FastTokenizer.from_str(json.dumps(content))
    fast.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    fast.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {} if legacy is None else {"legacy": legacy}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    ours, other = FolderTokenizer.open(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    some = ["the nation", "  two spaces", "war</s>the peace", "naïve 漢字", "\n line", " "]
    for text, ids in zip(some, ours.encode(some), strict=True):
        assert ids == [*other(text).input_ids, 2]
        assert ours.decode(ids) == other.decode(ids, skip_special_tokens=True)


def test_the_loss_is_that_of_transformers_including_the_first_token(llama, texts, tmp_path, capsys):
    some = [texts[0][:100], "<|user|>the war<|turn|> of peace", texts[1][:50]]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    model, tokenizer = theirs(llama)
    nats = tokens = 0
    for text in some:
        ids = torch.tensor([*tokenizer(text).input_ids, 1])
        with torch.no_grad():
            nats += cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum").item()
        tokens += len(ids) - 1
    main(["evaluate", str(llama), "--text", str(file)])
    found = json.loads(capsys.readouterr().out)["text"]
    assert found["tokens"] == tokens
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    size = sum(len(text.encode()) for text in some)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)  # every token is predicted


def test_generation_is_that_of_transformers_and_stops_at_any_end_id(llama, capsys):
    model, tokenizer = theirs(llama)
    ended = set()
    for prompt in ("the people", "<|user|>war", "law", "of peace", "treaty"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=60, do_sample=False)[0]
        ended.add(made[-1].item() if len(made) < ids.shape[1] + 60 else None)
        main(["generate", str(llama), f"--prompt={prompt}", "--temperature=0", "--max_new_tokens=60"])
        continued = tokenizer.decode(made, skip_special_tokens=True)[len(tokenizer.decode(ids[0], True)) :]
        assert capsys.readouterr().out == prompt + continued + "\n"
    assert model.generation_config.eos_token_id == [1, 292]
    assert 292 in ended  # otherwise the test would show nothing


def test_export_keeps_tokenizer_and_settings_and_names_the_source(llama, tmp_path):
    main(["export", str(llama), str(tmp_path / "out")])
    model, tokenizer = theirs(llama)
    again, copied = theirs(tmp_path / "out")
    text = "<|user|>the war</s> of peace"
    assert copied(text).input_ids == tokenizer(text).input_ids
    messages = [{"role": "user", "content": "war"}]
    assert copied.apply_chat_template(messages, tokenize=False) == "<|user|>war<|turn|>"
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id == [1, 292]
    for key in ("bos_token_id", "eos_token_id"):
        assert getattr(again.config, key) == getattr(model.config, key)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "converted by cola_lightning from chatty" in card
    assert "pre-trained with" not in card
    assert "adds no special id" not in card


@pytest.mark.slow
@needs_lm_eval
def test_task_scores_are_those_of_lm_eval_on_the_same_folder(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    write_task(tmp_path / "tasks")
    (tmp_path / "tasks" / "rolling.yaml").write_text(
        f"""task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "tasks" / "rows.jsonl"}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}} {{{{a}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
    )
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    names = ["rolling", "which_word"]
    right = simple_evaluate(
        model="hf", model_args={"pretrained": str(llama)}, tasks=names, task_manager=manager, device="cpu", batch_size=8
    )["results"]
    file = tmp_path / "r.json"
    main(
        ["evaluate", str(llama), f"--tasks={','.join(names)}", f"--include_path={tmp_path / 'tasks'}", f"--json={file}"]
    )
    found = json.loads(file.read_text())["tasks"]
    assert found["rolling"]["byte_perplexity"] == pytest.approx(right["rolling"]["byte_perplexity,none"], rel=1e-5)
    assert found["which_word"]["acc"] == right["which_word"]["acc,none"]


def test_a_named_tokenizer_adds_its_beginning_id_for_a_folder_but_not_for_a_run(llama, trained_run):
    assert load_model_for_inference(llama).tokenizer(str(llama)).prefix == [290]
    assert load_model_for_inference(trained_run).tokenizer(str(llama)).prefix == []


def test_ids_beyond_the_network_are_refused(llama):
    tokenizer = FolderTokenizer.open(str(llama))
    with pytest.raises(InputError, match="has 290 ids, but the network only 280"):
        tokenizer.check_fits(280)
    tokenizer.check_fits(291)
    assert tokenizer.encode(["war"])
    with pytest.raises(InputError, match=r"makes id 291 of '<\|user\|>', but the network has only 291"):
        tokenizer.encode(["<|user|>war"])


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"])
def test_a_truncated_file_is_reported_in_one_line(file, llama, tmp_path, capsys):
    for source in llama.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / file).write_bytes((llama / file).read_bytes()[:40])
    with pytest.raises(SystemExit, match="2"):
        main(["generate", str(tmp_path), "--prompt=a"])
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert file in errors[0]
