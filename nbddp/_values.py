"""Values that go beside an exported script: only what loads without the notebook, and without nbddp.

They are pickled by torch.save as they are. What cloudpickle could send besides (lambdas, classes by value) would need
it, and this version of Python, at the far end.
"""

from __future__ import annotations

import io
import pickle
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

from nbddp._errors import ExportError


@dataclass
class Contents:
    """What a value refers to.

    Attributes:
        definitions: Names of the notebook's functions and classes that loading it needs.
        gpus: Numbers of the GPUs that its tensors are on.
    """

    definitions: set[str] = field(default_factory=set)
    gpus: set[int] = field(default_factory=set)


class _Scout(pickle.Pickler):
    """Notes what is met on the way, and leaves the data of tensors alone."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), protocol=pickle.HIGHEST_PROTOCOL)
        self.met = Contents()

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and type(obj) in (torch.Tensor, torch.nn.Parameter):
            if obj.device.type == "cuda":
                self.met.gpus.add(obj.device.index or 0)
            return "tensor"
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | types.FunctionType) and obj.__module__ == "__main__":
            self.met.definitions.add(obj.__qualname__.partition(".")[0])
        return NotImplemented


def look(name: str, value: Any, why: str) -> Contents:
    """Return what a value refers to.

    Args:
        name: The notebook's name for it.
        value: The value.
        why: Why only the notebook has it.

    Raises:
        ExportError: It cannot be saved beside the script.
    """
    scout = _Scout()
    kind = type(value).__name__
    reason = ""
    if isinstance(value, type | types.FunctionType) and value.__module__ == "__main__":
        reason = "its source is in no cell"
    else:
        try:
            scout.dump(value)
        except Exception as error:
            text = str(error).strip().splitlines()
            reason = text[0] if text else f"pickling it raised {type(error).__name__}"
    if reason:
        raise ExportError(
            f"cannot save {name!r} ({kind}) beside the script: {reason}. Only the notebook has it ({why}); make it in "
            "the cell, or in one above"
        )
    return scout.met


def write(values: Mapping[str, Any], file: BinaryIO) -> bool:
    """Write values as ``torch.load`` reads them; return whether it reads them as plain data.

    Raises:
        OSError: The file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(dict(values), buffer)
    data = buffer.getbuffer()
    file.write(data)
    try:
        torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:
        return False
    return True
