"""`python -m preftune` is `preftune`."""

import sys

from preftune.cli import main

sys.exit(main())
