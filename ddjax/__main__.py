"""`python -m ddjax` is the `ddjax` command."""

import sys

from ddjax.cli import main

sys.exit(main())
