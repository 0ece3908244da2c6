"""Data of each kind on a disk, with the changes that a user may make to it under a checkpoint."""

import json
import shutil

from cola_lightning.data import C4DataModule, Source, TextDataModule
from cola_lightning.data.prepare import prepare
from cola_lightning.data.tokenizer import Tokenizer
from tests.data.conftest import fake_trainer, sentences, write_shard


class Streamed:
    """Mixture that is streamed from two folders of shards."""

    module = C4DataModule

    def __init__(self, folder):
        self.folder, self.text = folder, folder / "text"
        for name, shards in (("a", 3), ("b", 2)):
            (self.text / name).mkdir(parents=True)
            for number in range(shards):
                write_shard(self.text / name / f"train-{number}.json.gz", sentences(f"{name}{number}", 20))
        write_shard(self.text / "a" / "validation.json.gz", sentences("v", 20))
        Tokenizer.train(["a few words"], 300).save(folder / "tokenizer")
        Tokenizer.train(["some other words"], 290).save(folder / "other")
        self.options = {
            "sources": [Source(str(self.text / "a"), weight=0.75), Source(str(self.text / "b"), weight=0.25)],
            "tokenizer": str(folder / "tokenizer"),
            "sequence_length": 32,
            "batch_size": 2,
            "num_logical_shards": 2,
            "shuffle_buffer": 8,
            "validation_tokens": 200,
            "num_workers": 0,
            "cache_dir": str(folder / "cache"),
        }

    def begin(self, state=None, stage="fit", run_tokenizer=None, checkpoint=None):
        """Set the data module up as the command line and Lightning do."""
        data = self.module(**self.options)
        data.trainer = fake_trainer()
        if state or checkpoint:
            data.begin_from(checkpoint or {self.module.__name__: state}, run_tokenizer, stage == "fit")
        data.prepare_data()
        data.setup(stage)
        if state:
            data.load_state_dict(state)
        if stage == "fit":
            next(iter(data.train_dataloader()))
        return data

    # Changes of the data. CHANGES lists each with the expected message.

    def change(self, options):
        self.options |= options

    def add_file(self, file=None):
        shutil.copy(file or self.text / "a" / "train-1.json.gz", self.text / "a" / "train-9.json.gz")

    def rename_file(self):
        (self.text / "a" / "train-1.json.gz").rename(self.text / "a" / "train-7.json.gz")

    def replace_files(self):
        for number in range(3):
            write_shard(self.text / "a" / f"train-{number}.json.gz", sentences(f"other{number}", 21))

    def edit_file(self):
        file = next((self.text / "a").glob("*1*"))
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)

    def cut_file(self):
        file = next((self.text / "a").glob("*1*"))
        file.write_bytes(file.read_bytes()[:-9])

    def rename_column(self):
        self.options["sources"][0].text_column = "url"

    def swap_sources(self):
        self.options["validation"] = Source(self.options["sources"][0].path, split="validation")
        self.options["sources"].reverse()

    def change_weights(self):
        for source, weight in zip(self.options["sources"], (0.5, 0.5), strict=True):
            source.weight = weight

    def take_one_source_out(self):
        self.options["sources"] = [Source(str(self.text / "a"))]
        self.options["validation"] = Source(str(self.text / "a"), split="validation")

    def change_validation_text(self):
        write_shard(self.text / "a" / "validation.json.gz", sentences("w", 20))

    def name_another_tokenizer(self):
        self.options["tokenizer"] = str(self.folder / "other")

    def change_the_tokenizer_in_place(self):
        shutil.copytree(self.folder / "other", self.folder / "tokenizer", dirs_exist_ok=True)

    def move(self):
        self.text = self.text.rename(self.folder / "moved")
        for source, name in zip(self.options["sources"], "ab", strict=True):
            source.path = str(self.text / name)


class Prepared(Streamed):
    """Prepared folders of the same text."""

    def __init__(self, folder):
        super().__init__(folder)
        self.make()
        self.options["tokenizer"] = None

    def make(self, tokenizer="tokenizer", folder=None):
        for name, splits in (("a", ["validation", "train"]), ("b", ["train"])):
            target = (folder or self.folder / "prepared") / name
            prepare(Source(str(self.text / name)), str(target), splits, str(self.folder / tokenizer), num_workers=1)
        for source, name in zip(self.options["sources"], "ab", strict=True):
            source.path = str((folder or self.folder / "prepared") / name)

    def _anew(self):
        shutil.rmtree(self.folder / "prepared")
        self.make()

    def add_file(self):
        super().add_file()
        self._anew()

    def rename_file(self):
        super().rename_file()
        self._anew()

    def replace_files(self):
        super().replace_files()
        self.make()  # tokenizes the changed shards again

    def cut_file(self):
        file = self.folder / "prepared" / "a" / "train" / "00001.ids.bin"
        file.write_bytes(file.read_bytes()[:-2])

    def edit_file(self):
        file = self.folder / "prepared" / "a" / "train" / "00001.ids.bin"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)

    def change_validation_text(self):
        super().change_validation_text()
        self.make()

    def prepare_with_another_tokenizer(self):
        self.make("other", self.folder / "prepared_anew")

    def stream(self):
        self.options["tokenizer"] = str(self.folder / "tokenizer")
        for source, name in zip(self.options["sources"], "ab", strict=True):
            source.path = str(self.text / name)

    def move(self):
        (self.folder / "prepared").rename(self.folder / "moved")
        for source, name in zip(self.options["sources"], "ab", strict=True):
            source.path = str(self.folder / "moved" / name)

    def take_one_source_out(self):
        path = str(self.folder / "prepared" / "a")
        self.options |= {"sources": [Source(path)], "validation": Source(path, split="validation")}


class Texts(Streamed):
    """Folder of text files, with a BPE that is trained on them."""

    module = TextDataModule

    def __init__(self, folder):
        self.folder, self.text = folder, folder / "text"
        (self.text / "a").mkdir(parents=True)
        for number in range(6):
            rows = ({"text": text, "url": "http://x"} for text in sentences(f"a{number}", 20))
            (self.text / "a" / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        Tokenizer.train(["a few words"], 300).save(folder / "tokenizer")
        Tokenizer.train(["some other words"], 290).save(folder / "other")
        self.options = {
            "paths": [str(self.text / "a")],
            "vocab_size": 300,
            "sequence_length": 32,
            "batch_size": 2,
            "cache_dir": str(folder / "cache"),
        }

    def add_file(self):
        shutil.copy(self.text / "a" / "1.jsonl", self.text / "a" / "9.jsonl")

    def rename_file(self):
        (self.text / "a" / "1.jsonl").rename(self.text / "a" / "7.jsonl")

    def edit_file(self):
        file = self.text / "a" / "1.jsonl"
        file.write_text(file.read_text().replace("congress", "Congress"))

    def name_another_folder(self):
        shutil.copytree(self.text / "a", self.text / "b")
        (self.text / "b" / "1.jsonl").write_text((self.text / "b" / "1.jsonl").read_text().replace("war", "law"))
        self.options["paths"] = [str(self.text / "b")]

    def name_a_second_folder(self):
        shutil.copytree(self.text / "a", self.text / "b")
        self.options["paths"] = [*self.options["paths"], str(self.text / "b")]

    def move(self):
        self.text = self.text.rename(self.folder / "moved")
        self.options["paths"] = [str(self.text / "a")]


class NamedTokenizer(Texts):
    """Folder of text files, with a named tokenizer and separate validation files."""

    def __init__(self, folder):
        super().__init__(folder)
        (folder / "held_out.jsonl").write_text(json.dumps({"text": "the law of the land"}) + "\n")
        self.options |= {
            "tokenizer": str(folder / "tokenizer"),
            "validation_paths": [str(folder / "held_out.jsonl")],
        }

    def change_validation_text(self):
        (self.folder / "held_out.jsonl").write_text(json.dumps({"text": "the law of the sea"}) + "\n")
