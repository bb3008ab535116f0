"""`python -m auto_round` is the `auto-round` command."""

import sys

from auto_round.cli.main import main

sys.exit(main())
