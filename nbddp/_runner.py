"""Running a notebook from top to bottom without a browser: ``nbddp run NOTEBOOK``.

For a cluster's login node, a continuous integration job, this project's own ``make demo``.
"""

from __future__ import annotations

import os
from typing import Any


def run_notebook(path: str, *, timeout: float | None = None) -> int:
    """Run a notebook in the kernel that it names, in its own folder, and print its output as it comes.

    Args:
        path: The notebook's file; it is not changed.
        timeout: Seconds that one cell may take; None for any.

    Returns:
        0, or 1 if a cell failed; the cells after it are not run.
    """
    import nbformat
    from jupyter_client.manager import start_new_kernel

    notebook = nbformat.read(path, as_version=4)
    kernel = notebook.metadata.get("kernelspec", {}).get("name", "python3")
    folder = os.path.dirname(os.path.abspath(path))
    # ipykernel 7 warns at every start that its loopback connection is not encrypted.
    manager, client = start_new_kernel(kernel_name=kernel, cwd=folder, extra_arguments=["--log-level=ERROR"])
    try:
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                print(f"\n{cell.source}\n")
            elif cell.cell_type == "code" and cell.source.strip():
                print("\n".join(f"    {line}" for line in cell.source.splitlines()))
                reply = client.execute_interactive(
                    cell.source, allow_stdin=False, timeout=timeout, output_hook=_print_output
                )
                if reply["content"]["status"] != "ok":
                    return 1
        return 0
    finally:
        client.stop_channels()
        manager.shutdown_kernel()


def _print_output(message: dict[str, Any]) -> None:
    content = message["content"]
    match message["msg_type"]:
        case "stream":
            print(content["text"], end="", flush=True)
        case "display_data" | "execute_result":
            print(content["data"].get("text/plain", ""), flush=True)
        case "error":
            print("\n".join(content["traceback"]), flush=True)
