"""What is made safe for a spreadsheet comes back as it was."""

from hypothesis import given
from hypothesis import strategies as st

from pixelplay.data.tables import plain_label, plain_path, safe_label, safe_path

TEXTS = st.text(alphabet="'=+-@./ab\t", max_size=6)


@given(TEXTS)
def test_labels_come_back(label: str) -> None:
    assert plain_label(safe_label(label)) == label
    assert not safe_label(label).startswith(("=", "+", "-", "@", "\t", "\r"))


@given(TEXTS)
def test_paths_open_the_same_file_and_are_no_formula(path: str) -> None:
    assert not safe_path(path).startswith(("=", "+", "-", "@", "\t", "\r"))
    if not path.startswith("./"):
        assert plain_path(safe_path(path)) == path
