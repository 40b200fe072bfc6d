"""``python -m dlops_triton.perf``, if what it needs is installed."""

from __future__ import annotations

import importlib.util
import sys


def main() -> int:
    missing = [name for name in ("tqdm", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"perf needs {' and '.join(missing)}: pip install 'dlops-triton[perf]'")
        return 2
    from . import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
