"""A file has one subject (docs/design.md, section 4)."""

import tiny


def test_no_file_is_longer_than_500_lines():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in tiny.ROOT.glob("ddjax/**/*.py")}
    assert len(lengths) > 100
    assert {str(path.relative_to(tiny.ROOT)): n for path, n in lengths.items() if n > 500} == {}
