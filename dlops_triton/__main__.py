"""The command line: ``python -m dlops_triton check``."""

import sys

from .check import main

if __name__ == "__main__":
    sys.exit(main())
