"""``python -m nbddp``: the same as the command ``nbddp``."""

from __future__ import annotations

import sys

from nbddp._command import main

if __name__ == "__main__":
    sys.exit(main())
