"""Check what the source of a module says about the names that it binds, without running it."""

import pytest

from cola_lightning.cli.import_policy import ImportDenied, check_import


@pytest.mark.parametrize(
    ("source", "bound"),
    [
        ("class A: pass", True),
        ("def A(): pass", True),
        ("async def A(): pass", True),
        ("import A.b", True),
        ("from x import y as A", True),
        ("from x import *", True),
        ("if 1:\n  A = 1", True),
        ("try:\n  pass\nexcept E:\n  A = 1", True),
        ("(A, b) = 1, 2", True),
        ("def __getattr__(name): ...", True),
        ("import x.A", False),
        ("def f():\n  A = 1", False),
        ("class B:\n  A = 1", False),
        ("B.A = 1", False),
        ("print('A')", False),
        ("x = ('*', 'A')", False),
        ("A(", False),
        ("\0", False),
        ("(" * 500 + ")" * 500, False),
    ],
)
def test_a_module_is_imported_only_if_its_source_binds_the_name(source, bound, tmp_path, monkeypatch):
    (tmp_path / "never_imported_before.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    if bound:
        check_import("never_imported_before.A")
    else:
        with pytest.raises(ImportDenied, match=r"never_imported_before holds no A\.$"):
            check_import("never_imported_before.A")
