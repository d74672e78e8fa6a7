"""``python -m tidar`` is the ``tidar`` command."""

import sys

from tidar.cli import main

sys.exit(main())
