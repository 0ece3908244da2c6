import numpy as np
import pyarrow as pa

from cola_lightning.data.rows import Documents, PackedRows, PaddedRows

COLUMN = pa.chunked_array([[[5, 6, 1], [7, 1]], [[8, 9, 10, 11, 12, 1]]], pa.list_(pa.int32()))


def lists(rows):
    return [(rows[i]["input_ids"].tolist(), rows[i]["labels"].tolist()) for i in range(len(rows))]


def test_documents_keep_their_boundaries_over_chunks():
    documents = Documents(COLUMN)
    assert len(documents) == 3
    assert [document.tolist() for document in map(documents.__getitem__, range(3))] == COLUMN.to_pylist()


def test_a_slice_of_a_column_is_read_as_such():
    documents = Documents(pa.chunked_array([COLUMN.chunk(0).slice(1)]))
    assert documents.ids.tolist() == [7, 1]
    assert np.array_equal(documents.offsets, [0, 2])


def test_padded_rows_hold_a_document_each():
    assert lists(PaddedRows(Documents(COLUMN), 4, pad_id=0)) == [
        ([5, 6, 1, 0], [5, 6, 1, -100]),
        ([7, 1, 0, 0], [7, 1, -100, -100]),
        ([8, 9, 10, 1], [8, 9, 10, 1]),  # cut, and ended all the same
    ]


def test_packed_rows_lose_nothing():
    assert lists(PackedRows(Documents(COLUMN), 4, pad_id=0)) == [
        ([5, 6, 1, 7], [5, 6, 1, 7]),
        ([1, 8, 9, 10], [1, 8, 9, 10]),
        ([11, 12, 1, 0], [11, 12, 1, -100]),
    ]
