"""`python -m dualxda_jax` is the command `dualxda`."""

import sys

from dualxda_jax.cli import main

sys.exit(main())
