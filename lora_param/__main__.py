"""`python -m lora_param`: the command line."""

import sys

from .io.cli import main

if __name__ == "__main__":
    sys.exit(main())
