"""`python -m dydit_cli` is `dydit`."""

import sys

from dydit_cli.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
