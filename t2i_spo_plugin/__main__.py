"""`python -m t2i_spo_plugin` is `spo`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
