"""The cells of a notebook's file, and which of them is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from nbddp._cells import Cell
from nbddp._errors import ExportError


def read(path: str) -> list[Cell]:
    """Return the code cells of a notebook's file.

    Raises:
        ExportError: It is no notebook that can be read.
    """
    import nbformat

    try:
        with open(path, encoding="utf-8") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fields that newer versions want
            text = file.read()
            version = nbformat.reader.parse_json(text)["nbformat"]
            notebook = nbformat.reads(text, as_version=4)
    except FileNotFoundError:
        raise ExportError(f"there is no notebook {path}") from None
    except IsADirectoryError:
        raise ExportError(f"{path} is a folder; give a notebook in it") from None
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from None
    except (KeyError, TypeError):
        raise ExportError(f"{path} is no notebook: it does not say which nbformat it is in") from None
    except Exception as error:  # of JSON, of nbformat, or of whatever is in the file
        reason = str(error).strip().splitlines()
        raise ExportError(f"{path} is no notebook: {reason[0][:200] if reason else type(error).__name__}") from None
    if version < 4:
        raise ExportError(
            f"{path} is in nbformat {version}, which ended in 2015; jupyter nbconvert --to notebook --inplace {path} "
            "brings it up to date"
        )
    metadata = notebook.metadata
    language = metadata.get("language_info", {}).get("name") or metadata.get("kernelspec", {}).get("language")
    if language not in (None, "python"):
        raise ExportError(f"{path} is a notebook of {language}; nbddp exports Python")
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    saved = [cell.get("execution_count") for cell in code]
    # Without numbers, those that "run all" would give.
    numbers = saved if any(number is not None for number in saved) else [*range(1, len(code) + 1)]
    return [
        Cell(cell.source, number, tuple(cell.metadata.get("tags", ())))
        for cell, number in zip(code, numbers, strict=True)
    ]


def chosen(cells: Sequence[Cell], asked: str | None, path: str) -> int:
    """Return the position of the cell that is asked for.

    Raises:
        ExportError: There is none, or more than one.
    """
    found = [i for i, cell in enumerate(cells) if cell.ddp is not None]
    if not found:
        raise ExportError(f"{path} has no %%ddp cell; nbddp exports cells that begin with %%ddp")
    if asked is None:
        if len(found) == 1:
            return found[0]
        raise ExportError(
            f"{path} has {len(found)} %%ddp cells; say which by --cell NUMBER or --cell TAG", details=listed(cells)
        )
    if asked.isdigit():
        return numbered(cells, int(asked), f"--cell {asked}", path)
    tagged = [i for i in found if asked in cells[i].tags]
    if len(tagged) == 1:
        return tagged[0]
    if tagged:
        raise ExportError(f"--cell {asked}: {len(tagged)} %%ddp cells have this tag", details=listed(cells))
    raise ExportError(f"--cell {asked}: no %%ddp cell of {path} has this tag", details=listed(cells))


def numbered(cells: Sequence[Cell], number: int, asked: str, where: str) -> int:
    """Return the position of the ``%%ddp`` cell that has a number.

    Raises:
        ExportError: There is none, or more than one.
    """
    there = [i for i, cell in enumerate(cells) if cell.number == number]
    found = [i for i in there if cells[i].ddp is not None]
    if len(found) == 1:
        return found[0]
    if found:
        problem = f"{len(found)} cells of {where} have this number; run it anew"
    else:
        problem = f"cell [{number}] of {where} {'is no %%ddp cell' if there else 'is not there'}; these are"
    raise ExportError(f"{asked}: {problem}", details=listed(cells))


def listed(cells: Sequence[Cell]) -> tuple[str, ...]:
    """Return a line for each ``%%ddp`` cell."""
    lines = []
    for cell in cells:
        if cell.ddp is not None:
            first = next((line for line in cell.ddp[1].split("\n") if line.strip()), "")
            tags = f"  (tagged {', '.join(cell.tags)})" if cell.tags else ""
            lines.append(f"  {cell.label:>5}  {f'%%ddp {cell.ddp[0]}'.rstrip()}{tags}  {first.strip():.60}".rstrip())
    return tuple(lines)
