"""python -m fd2fast COMMAND."""

import sys

from fd2fast.cli import main

sys.exit(main())
