"""Optimizers, and whose parameters they step: the notebook's model's, or another's of the same name."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any


def of_models(optimizers: Mapping[str, Any], models: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the names of an optimizer and of a model whose parameters it steps; what is neither is passed over.

    Args:
        optimizers: Values by name, among them optimizers.
        models: Values by name, among them models.
    """
    # Who has none of torch's objects has not imported it.
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "optim"):
        return
    modules = {name: model for name, model in models.items() if isinstance(model, torch.nn.Module)}
    for name, optimizer in optimizers.items():
        if name.startswith("_") or not isinstance(optimizer, torch.optim.Optimizer):
            continue
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for model, module in modules.items():
            if any(id(parameter) in own for parameter in module.parameters()):
                yield name, model
