"""What pytest --nbval cannot tell: that the saved notebooks hold something to be compared with."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_saved_as_it_runs_from_top_to_bottom(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(output.output_type == "stream" for cell in cells for output in cell.outputs)
    for cell in cells:
        failed = any(output.output_type == "error" for output in cell.outputs)
        assert failed == ("raises-exception" in cell.metadata.get("tags", ())), cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_most_of_what_it_shows_is_compared(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    compared = [cell for cell in cells if "nbval-ignore-output" not in cell.metadata.get("tags", ())]
    assert len(compared) > len(cells) / 2
    assert any(cell.outputs for cell in compared)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_saved_without_what_differs_from_one_machine_to_the_next(path: Path) -> None:
    text = path.read_text()
    for trace in ("/home/", "/root/", "/tmp/", "/work/", "Warning:", "site-packages"):
        assert trace not in text, trace
