import json
import os
import pickle
import shutil

import lightning as L
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

from cola_lightning.data import C4DataModule, Source, StreamingDataModule
from cola_lightning.data.packing import IGNORE
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from cola_lightning.training.losses import next_token_losses
from cola_lightning.training.module import LanguageModel
from tests.data.conftest import arguments, fake_trainer, sentences, write_shard
from tests.data.server import Server


def ready(data: C4DataModule, ranks: int = 1, rank: int = 0, stage: str = "fit") -> C4DataModule:
    """Set the data module up as a trainer does."""
    share = {"num_replicas": ranks, "rank": rank} if ranks > 1 else None
    data.trainer = fake_trainer(max_steps=1000, distributed_sampler_kwargs=share)
    data.prepare_data()
    data.setup(stage)
    return data


def take(data: C4DataModule, count: int) -> list[dict[str, torch.Tensor]]:
    iterator = iter(data.train_dataloader())
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_validation_is_the_first_tokens_and_the_same_for_every_world_size(c4, rows):
    seen = []
    for ranks in (1, 2, 3):
        loaders = [
            ready(C4DataModule(**arguments(c4, rows=rows)), ranks, rank, "validate").val_dataloader()
            for rank in range(ranks)
        ]
        assert len({len(loader) for loader in loaders}) == 1
        batches = [batch for loader in loaders for batch in loader]
        rows_seen = [
            tuple(ids.tolist())
            for batch in batches
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
            if (labels != IGNORE).any()
        ]
        seen.append(sorted(rows_seen))
        tokens = sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)
        assert 500 <= tokens < 500 + 200
    assert seen[0] == seen[1] == seen[2]


def test_a_folder_has_no_configuration_and_c4_has_en(c4, tmp_path):
    assert C4DataModule().sources.training[0].title == "allenai/c4/en"
    assert C4DataModule(name="realnewslike").sources.training[0].title == "allenai/c4/realnewslike"
    for shard in c4.glob("*.json.gz"):
        shutil.copy(shard, tmp_path)
    data = ready(C4DataModule(path=str(tmp_path), tokenizer=f"{c4}/tokenizer", cache_dir=f"{c4}/cache"))
    assert data.sources.training[0].name is None
    assert len(data.sources.corpora[0].shards) == 5


def test_validation_set_is_made_once(c4, tmp_path):
    data = arguments(c4, cache_dir=str(tmp_path))
    ready(C4DataModule(**data))
    [folder] = tmp_path.iterdir()
    before = folder.stat().st_mtime_ns
    ready(C4DataModule(**data))
    assert [folder] == list(tmp_path.iterdir())
    assert folder.stat().st_mtime_ns == before
    ready(C4DataModule(**data | {"validation_tokens": 100}))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_copy_of_the_text_takes_the_validation_set_and_a_changed_one_does_not(c4, tmp_path):
    """Small files are known by their content, so that text and cache can move to another machine."""
    copied, cache = tmp_path / "copied", tmp_path / "cache"
    shutil.copytree(c4, copied)
    for shard in copied.glob("*.json.gz"):
        os.utime(shard, (1, 1))
    ready(C4DataModule(**arguments(c4, cache_dir=str(cache))))
    made = list(cache.iterdir())
    ready(C4DataModule(**arguments(copied, cache_dir=str(cache))))
    assert list(cache.iterdir()) == made
    write_shard(copied / "c4-validation.00000-of-00001.json.gz", sentences("w", 40))
    ready(C4DataModule(**arguments(copied, cache_dir=str(cache))))
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("name", ["ids.npy", "offsets.npy"])
def test_a_damaged_validation_set_is_made_again_with_a_warning(c4, tmp_path, name):
    first = ready(C4DataModule(**arguments(c4, cache_dir=str(tmp_path))))
    [folder] = tmp_path.iterdir()
    content = (folder / name).read_bytes()
    (folder / name).unlink()  # the file itself is mapped into memory
    (folder / name).write_bytes(content[:-40])
    with pytest.warns(UserWarning, match=rf"the cache {folder} is damaged .*, and is made anew"):
        again = ready(C4DataModule(**arguments(c4, cache_dir=str(tmp_path))))
    assert (again.validation_rows.documents.ids == first.validation_rows.documents.ids).all()


def test_validation_set_at_an_address_is_made_again_when_the_file_changes(c4, tmp_path):
    write_shard(tmp_path / "validation.json.gz", sentences("v", 30))
    server = Server(tmp_path)
    server.ranges = "bytes"
    held_out = Source("json", split="validation", data_files={"validation": f"{server.url}/validation.json.gz"})
    settings = arguments(c4, validation=held_out, validation_tokens=10**6, cache_dir=str(tmp_path / "cache"))

    def lengths():
        return ready(C4DataModule(**settings), stage="validate").validation_rows.documents.offsets.tolist()

    first = lengths()
    server.requests.clear()
    assert lengths() == first
    only_looked = len(server.requests)
    write_shard(tmp_path / "validation.json.gz", sentences("w", 31))
    second = lengths()
    assert second != first
    server.tags["validation.json.gz"] = '"as-before"'
    lengths()
    server.requests.clear()
    lengths()
    assert len(server.requests) == only_looked
    server.requests.clear()
    server.tags["validation.json.gz"] = '"changed"'
    assert lengths() == second
    assert len(server.requests) > only_looked
    server.close()


def test_sources_are_mixed_and_counted_by_name(c4, tmp_path):
    write_shard(tmp_path / "train.json.gz", sentences("other", 50))
    sources = [
        Source("json", data_files=f"{c4}/c4-train*", weight=0.75),
        Source(str(tmp_path), weight=0.25),
    ]
    held_out = Source("json", split="validation", data_files=arguments(c4)["data_files"])
    data = ready(C4DataModule(**arguments(c4, sources=sources, validation=held_out)))
    take(data, 200)
    counts_by_source = data.source_counts()
    assert list(counts_by_source) == ["json", str(tmp_path)]
    tokens = [counts["tokens"] for counts in counts_by_source.values()]
    assert tokens[0] / sum(tokens) == pytest.approx(0.75, abs=0.01)
    assert sum(counts["documents"] for counts in counts_by_source.values()) == 400


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"sequence_length": 1}, "sequence_length is 1; it must be at least 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_logical_shards": 0}, "num_logical_shards is 0"),
        ({"sources": [Source("a", weight=0.5), Source("b", weight=0.4)]}, r"in sum 0\.9; .* must sum to 1"),
        ({"sources": [Source("a", weight=2.0), Source("b", weight=-1.0)]}, "each above 0"),
        ({"sources": [Source("a", weight=0.5), Source("a", weight=0.5)]}, "the same path and name"),
        ({"mask_documents": True}, "for packed rows"),
    ],
)
def test_invalid_arguments_are_refused(c4, others, message):
    with pytest.raises(InputError, match=message):
        C4DataModule(**arguments(c4, **others))


def test_missing_and_empty_data_is_refused(c4, tmp_path):
    with pytest.raises(InputError, match="has no split 'validation'; it has train"):
        ready(C4DataModule(**arguments(c4, data_files=f"{c4}/c4-train*")))
    with pytest.raises(InputError, match=r"c4-validation.* has no 'content'"):
        ready(C4DataModule(**arguments(c4, text_column="content", cache_dir=str(tmp_path))))
    write_shard(tmp_path / "train.json.gz", ["", "\n"])
    empty = Source(str(tmp_path))
    held_out = Source("json", split="validation", data_files=arguments(c4)["data_files"])
    with pytest.raises(InputError, match="has no document; every shard or every text is empty"):
        take(ready(C4DataModule(**arguments(c4, sources=[empty], validation=held_out))), 1)
    with pytest.raises(InputError, match="has no document to validate on"):
        ready(C4DataModule(**arguments(c4, validation=empty)))


def resumed(c4, state, **others) -> C4DataModule:
    data = C4DataModule(**arguments(c4, **others))
    data.load_state_dict(state)
    return ready(data)


def test_a_run_may_switch_between_stream_and_prepared_data(c4, prepared):
    whole = take(ready(C4DataModule(**arguments(c4, rows="packed"))), 30)
    state, batches = None, []
    for path in ("json", str(prepared), "json"):
        others = {"path": path, "rows": "packed"} | ({"data_files": None, "tokenizer": None} if path != "json" else {})
        data = resumed(c4, state, **others)
        batches += take(data, 10)
        state = json.loads(json.dumps(data.state_dict()))
    assert all((one["input_ids"] == other["input_ids"]).all() for one, other in zip(whole, batches, strict=True))


def test_from_python_a_run_on_c4_resumes_as_any_stream_at_the_next_batch(c4, tmp_path):
    def fit(data: StreamingDataModule, steps: int, ckpt_path: str | None = None) -> int:
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(LanguageModel(300, 16, 24, 1, 2), data, ckpt_path=ckpt_path, weights_only=True)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return data.state_dict()["batches"]

    assert fit(C4DataModule(**arguments(c4)), 2) == 2
    assert fit(StreamingDataModule(**arguments(c4)), 3, ckpt_path=str(tmp_path / "last.ckpt")) == 3


def test_a_loader_that_could_not_be_made_leaves_torchs_loaders_as_they_were(c4):
    """Lightning wraps their methods while it asks for a loader, and leaves them wrapped if that raises."""
    names = ("__init__", "__setattr__", "__delattr__")
    before = [getattr(owner, name) for owner in (DataLoader, BatchSampler) for name in names]
    trainer = L.Trainer(accelerator="cpu", max_steps=1, overfit_batches=0.5, logger=False, enable_checkpointing=False)
    with pytest.raises(InputError, match="a stream has no length"):
        trainer.fit(LanguageModel(300, 16, 24, 1, 2), C4DataModule(**arguments(c4)))
    assert [getattr(owner, name) for owner in (DataLoader, BatchSampler) for name in names] == before


def test_a_run_may_change_its_batch_size_and_repeats_no_document(c4):
    state, firsts = None, []
    for batch_size, count in ((2, 9), (5, 6), (1, 20)):
        data = resumed(c4, state, batch_size=batch_size)
        firsts += [tuple(row.tolist()) for batch in take(data, count) for row in batch["input_ids"]]
        state = data.state_dict()
    assert len(firsts) == len(set(firsts)) == 18 + 30 + 20


def test_corrupted_shard_is_found_at_start_by_name(c4, prepared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    file = folder / "train" / "00003.ids.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 4
    file.write_bytes(content)
    prepared_arguments = arguments(c4, path=str(folder), data_files=None, tokenizer=None)
    with pytest.raises(InputError, match=r"train/00003\.ids\.bin is corrupted"):
        ready(C4DataModule(**prepared_arguments))
    ready(C4DataModule(**prepared_arguments, verify=False))


def test_prepared_with_another_tokenizer_is_refused(c4, prepared, tmp_path):
    Tokenizer.train(["other words"], 270).save(tmp_path)
    with pytest.raises(InputError, match="was prepared with another tokenizer"):
        ready(C4DataModule(**arguments(c4, path=str(prepared), data_files=None, tokenizer=str(tmp_path))))


def test_with_a_document_mask_each_packed_document_has_the_loss_that_it_has_alone(c4):
    """Packed rows of whole documents are compared with rows of one document each."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LanguageModel(vocab_size=300, **sizes)
    model.configure_model()
    packed = {"rows": "packed", "sequence_length": 512, "mask_documents": True}
    data = ready(C4DataModule(**arguments(c4, **packed)))
    for batch in (*take(data, 3), *data.val_dataloader()):
        losses, kept = next_token_losses(model.network, batch)
        for row in range(2):
            ids, numbers = batch["input_ids"][row], batch["document_ids"][row]
            for number in range(1, int(numbers.max())):
                own = numbers == number
                if not (batch["labels"][row][own] != IGNORE).any():
                    continue
                document = ids[own].unsqueeze(0)
                alone, _ = next_token_losses(model.network, {"input_ids": document, "labels": document})
                of_own = own.roll(-1)  # positions where the next token belongs to the same document
                of_own[-1] = False
                assert (losses[row][of_own][1:] - alone[0, :-1]).abs().max() < 1e-5
                assert kept[row][of_own].tolist() == [False] + [True] * (document.shape[1] - 1)


@pytest.mark.parametrize("path", ["json", "prepared"])
def test_logical_shards_can_be_pickled_for_spawned_workers(c4, prepared, path):
    others = {} if path == "json" else {"path": str(prepared), "data_files": None, "tokenizer": None}
    data = ready(C4DataModule(**arguments(c4, **others)))
    make_logical_shards = data.train_dataloader().make_logical_shards
    sent = pickle.loads(pickle.dumps(make_logical_shards))
    assert (sent([1], {}).batch(1, 4)["input_ids"] == make_logical_shards([1], {}).batch(1, 4)["input_ids"]).all()
