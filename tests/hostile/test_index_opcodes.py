"""Refuse indexes of sharded checkpoints with foreign opcodes, or with known opcodes in a harmful use."""

import pickle
import pickletools
import struct

import pytest
import torch
from torch.distributed import checkpoint as sharded
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from cola_lightning.checkpoints.shard_index import parse_index
from cola_lightning.checkpoints.shard_index_pickle import OPCODES as USED_OPCODES
from cola_lightning.checkpoints.shard_index_records import ForeignError

OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
USED = set(USED_OPCODES) | {b"."}


@pytest.fixture(scope="module")
def genuine(tmp_path_factory) -> bytes:
    """Return an index that torch has written, of tensors of several kinds and plain data."""
    folder = tmp_path_factory.mktemp("genuine")
    state = {
        "state_dict": {f"w{dtype}": torch.ones(2, 3, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)},
        "optimizer_0": {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}], "state": {"w": torch.zeros(70_000)}},
        "none": None,
    }
    sharded.save(state, checkpoint_id=folder, no_dist=True)
    return (folder / ".metadata").read_bytes()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_an_index_of_torch_is_read_as_by_pickle(genuine, protocol):
    expected = pickle.loads(genuine)
    again = pickle.dumps(expected, protocol)
    assert parse_index(again) == expected
    assert {type(entry) for entry in parse_index(again).state_dict_metadata.values()} == {
        type(entry) for entry in expected.state_dict_metadata.values()
    }


def test_an_index_of_many_ranks_is_read(genuine):
    """A 7B model with Adam on 64 ranks has 100,000 entries, which take seconds; 20,000 are tested."""
    metadata = pickle.loads(genuine)
    info = next(iter(metadata.storage_data.values()))
    metadata.storage_data = {MetadataIndex(f"w{i}", torch.Size([i]), i): info for i in range(20_000)}
    assert len(parse_index(pickle.dumps(metadata, 4)).storage_data) == 20_000


@pytest.mark.parametrize("code", sorted(OPCODES.keys() - USED))
def test_every_other_opcode_is_refused(code):
    arguments = b"\x01\x00\x00\x00\x00\x00\x00\x00os\nsystem\n"
    with pytest.raises(ForeignError, match="the pickle opcode"):
        parse_index(b"\x80\x04" + code + arguments + b".")


def text(value: str) -> bytes:
    return b"\x8c" + struct.pack("<B", len(value)) + value.encode()


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


INDEX = name("torch.distributed.checkpoint.metadata", "MetadataIndex")
SIZE = name("torch", "Size")
HOSTILE = {
    "calls a function": name("os", "system") + text("touch trace") + b"\x85R",
    "calls by the old opcode": b"cos\nsystem\n" + text("touch trace") + b"\x85R",
    "evaluates": name("builtins", "eval") + text("1") + b"\x85R",
    "takes an attribute": name("builtins", "getattr") + INDEX + text("__init__") + b"\x86R",
    "takes a nested name": name("torch.distributed.checkpoint.metadata", "os.system") + text("x") + b"\x85R",
    "takes what a module imports": name("torch.distributed.checkpoint.filesystem", "os") + b")R",
    "loads by torch": name("torch", "load") + text("evil.ckpt") + b"\x85R",
    "sets a class's attribute": INDEX + b"}" + text("__eq__") + SIZE + b"sb",
    "sets a class's attribute by slots": INDEX + b"N}" + text("__hash__") + SIZE + b"s\x86b",
    "sets the state of text": text("x") + b"}" + text("a") + b"Ksb",
    "sets a method of a record": INDEX + b")\x81}" + text("__class__") + SIZE + b"sb",
    "sets a field to another kind": INDEX + b")\x81}" + text("fqn") + b"]sb",
    "makes a class that is none of its own": SIZE + b")\x81",
    "makes a record with arguments": INDEX + text("fqn") + b"\x85\x81",
    "calls a record": INDEX + b")R",
    "calls what is no name": text("os.system") + b")R",
    "appends to a size": SIZE + b"]\x85R" + b"K\x01a",
    "has a list as key": b"}]K\x01s",
    "has a tuple as key": b"})K\x01s",
    "transforms what it reads": (
        name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
        + b")\x81}" + text("transform_descriptors") + text("zstd") + b"\x85sb"
    ),
    "takes a setstate": name("torch.distributed.checkpoint.metadata", "TensorProperties.__setstate__") + b")R",
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_harmful_uses_of_known_opcodes_are_refused(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {attribute: getattr(MetadataIndex, attribute) for attribute in ("__eq__", "__hash__", "__init__")}
    with pytest.raises((ForeignError, ValueError)):
        parse_index(b"\x80\x04" + HOSTILE[kind] + b".")
    assert not list(tmp_path.iterdir())
    assert {attribute: getattr(MetadataIndex, attribute) for attribute in before} == before


def test_a_record_that_changes_after_its_check_is_checked_again(genuine):
    """The memo holds the dict of a record's state, so the file can fill it after the record was made."""
    metadata = pickle.loads(genuine)
    metadata.state_dict_metadata = {}
    whole = pickle.dumps(metadata, 2)
    at = whole.index(b"}", whole.index(b"state_dict_metadata"))  # the dict of entries, and its place in the memo
    place = whole[at + 2]
    late = whole[:-1] + b"h" + bytes([place]) + b"X\x01\x00\x00\x00aK\x01s0."
    assert pickle.loads(late).state_dict_metadata == {"a": 1}
    with pytest.raises(ForeignError):
        parse_index(late.replace(b"0.", b"."))  # an index does not have the opcode POP either
    with pytest.raises((ForeignError, ValueError)):
        parse_index(late)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_index_is_refused(genuine, share):
    with pytest.raises((ValueError, ForeignError)):
        parse_index(genuine[: int(len(genuine) * share)])


def test_an_altered_byte_is_an_error_or_a_value(genuine):
    """There is no other exception and no object of another class."""
    for at in range(0, len(genuine), 7):
        altered = bytearray(genuine)
        altered[at] ^= 0x15
        try:
            metadata = parse_index(bytes(altered))
        except (ForeignError, ValueError):
            continue
        assert all(type(each).__module__.startswith("torch") for each in metadata.state_dict_metadata.values())
        sizes = [e.size for e in metadata.state_dict_metadata.values() if isinstance(e, TensorStorageMetadata)]
        assert all(isinstance(size, torch.Size) for size in sizes)
