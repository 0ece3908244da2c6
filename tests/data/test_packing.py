import numpy as np
import pyarrow as pa

from cola_lightning.data.packing import Documents, Rows, RowShape

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


def test_a_padded_row_holds_one_document():
    assert lists(Rows(Documents(COLUMN), RowShape(4, packed=False, pad_id=0))) == [
        ([5, 6, 1, 0], [5, 6, 1, -100]),
        ([7, 1, 0, 0], [7, 1, -100, -100]),
        ([8, 9, 10, 1], [8, 9, 10, 1]),  # cut, and ended with the end-of-document id
    ]


def test_packed_rows_hold_all_tokens():
    assert lists(Rows(Documents(COLUMN), RowShape(4, packed=True, pad_id=0))) == [
        ([5, 6, 1, 7], [5, 6, 1, 7]),
        ([1, 8, 9, 10], [1, 8, 9, 10]),
        ([11, 12, 1, 0], [11, 12, 1, -100]),
    ]


def test_masked_rows_number_their_documents_and_do_not_learn_first_tokens():
    rows = Rows(Documents(COLUMN), RowShape(4, packed=True, pad_id=0, mask_documents=True))
    assert [rows[i]["document_ids"].tolist() for i in range(3)] == [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 1]]
    assert [rows[i]["labels"].tolist() for i in range(3)] == [
        [-100, 6, 1, -100],
        [1, -100, 9, 10],
        [11, 12, 1, -100],
    ]


def test_a_document_may_fill_several_rows_and_a_row_may_end_with_a_document():
    documents = Documents(pa.chunked_array([[[2, 3, 4, 5, 6, 7, 8, 9, 1], [5, 6, 1]]], pa.list_(pa.int32())))
    rows = Rows(documents, RowShape(3, packed=True, pad_id=0, mask_documents=True))
    assert [rows[i]["input_ids"].tolist() for i in range(4)] == [[2, 3, 4], [5, 6, 7], [8, 9, 1], [5, 6, 1]]
    assert [rows[i]["labels"][0].item() for i in range(4)] == [-100, 5, 8, -100]
