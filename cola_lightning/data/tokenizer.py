"""Text to ids and back: any tokenizer in Hugging Face's format, or a byte-level BPE trained here."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from cola_lightning.errors import InputError

PAD, EOS = "<pad>", "</s>"
EOS_NAMES = (EOS, "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")


class Tokenizer:
    """Encodes a document as its ids and one end-of-document id.

    Special tokens are never read out of the text: in a document that contains ``</s>`` or ``<extra_id_0>`` literally, a
    space breaks the string up. So T5's hundred sentinels cannot occur, and ``vocab_size`` is 32,000 for t5-base, not
    32,100: the table size that the published configurations have.

    Args:
        fast: A tokenizer of the ``tokenizers`` library.
        eos_id: Id put after each document.
        pad_id: Id that fills rows up; None if the tokenizer has none.
        name: Where it came from, for messages.
    """

    def __init__(self, fast: FastTokenizer, eos_id: int, pad_id: int | None, name: str) -> None:
        fast.no_padding()
        fast.no_truncation()
        self.fast, self.eos_id, self.pad_id, self.name = fast, eos_id, pad_id, name
        special = {i: token.content for i, token in fast.get_added_tokens_decoder().items() if token.special}
        ids = set(fast.get_vocab().values()) - set(special) | {eos_id} | ({pad_id} - {None})
        self.vocab_size = 1 + max(ids)
        self._special = re.compile("|".join(map(re.escape, special.values())) or r"(?!)")

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, ended by ``eos_id``."""
        texts = [self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text) for text in texts]
        return [[*item.ids, self.eos_id] for item in self.fast.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return str(self.fast.decode(ids, skip_special_tokens=True))

    def check_fits(self, vocab_size: int) -> None:
        """Refuse a network with fewer rows in its embedding than this tokenizer has ids.

        Raises:
            InputError: If it has.
        """
        if self.vocab_size > vocab_size:
            raise InputError(
                f"tokenizer {self.name} has {self.vocab_size} ids, but the network only {vocab_size}; name the "
                f"tokenizer that it was trained with by --tokenizer"
            )

    def fingerprint(self) -> str:
        """Equal for tokenizers that make the same ids of every text."""
        return hashlib.sha256(f"{self.fast.to_str()}{self.eos_id}".encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, as Hugging Face lays them out."""
        folder.mkdir(parents=True, exist_ok=True)
        self.fast.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.fast.id_to_token(self.eos_id)}
        if self.pad_id is not None:
            settings["pad_token"] = self.fast.id_to_token(self.pad_id)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))

    @classmethod
    def load(cls, name: str) -> "Tokenizer":
        """From a folder that holds ``tokenizer.json``, such a file itself, or the name of a repository on the hub.

        Raises:
            InputError: If there is none, or it names no end-of-document token.
        """
        file, settings = (_local if Path(name).exists() else _from_hub)(name)
        try:
            fast = FastTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{file} is not a tokenizer.json of the tokenizers library: {error}") from error
        names = [_token(settings, "eos_token") or EOS, *EOS_NAMES]
        eos_id = next((i for i in map(fast.token_to_id, names) if i is not None), None)
        if eos_id is None:
            raise InputError(f"tokenizer {name} names no eos_token; add it to the tokenizer_config.json beside {file}")
        return cls(fast, eos_id, fast.token_to_id(_token(settings, "pad_token") or PAD), name)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a byte-level BPE, which can spell any text, with ids 0 for padding and 1 for the end of a document.

        Raises:
            InputError: If ``vocab_size`` leaves no room for the 256 bytes and the two special tokens.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet) + 2:
            raise InputError(
                f"vocab_size {vocab_size} is too small for a byte-level BPE; choose {len(alphabet) + 2} or more"
            )
        fast = FastTokenizer(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
        )
        fast.train_from_iterator(texts, trainer)
        return cls(fast, eos_id=1, pad_id=0, name=f"byte-level BPE of {vocab_size} trained on the corpus")


def _token(settings: dict, key: str) -> str | None:
    value = settings.get(key)
    return value["content"] if isinstance(value, dict) else value


def tokenizer_file(name: str) -> Path:
    """The tokenizer.json that a folder holds, or that is named itself.

    Raises:
        InputError: If there is none.
    """
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"{path} holds no tokenizer.json; name a folder that does, the file itself, or a hub repository"
        )
    return file


def _local(name: str) -> tuple[Path, dict]:
    file = tokenizer_file(name)
    settings: dict = {}
    for beside in (file.parent / other for other in SETTINGS):
        if beside.is_file():
            settings = json.loads(beside.read_text(encoding="utf-8")) | settings
    return file, settings


def _from_hub(name: str) -> tuple[Path, dict]:
    try:
        file = Path(hf_hub_download(name, "tokenizer.json"))
        return file, json.loads(Path(hf_hub_download(name, SETTINGS[0])).read_text(encoding="utf-8"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"tokenizer {name!r} is neither a folder here nor to be had from the Hugging Face hub ({reason}); "
            f"name a folder with a tokenizer.json"
        ) from error
