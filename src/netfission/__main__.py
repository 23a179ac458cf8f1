"""`python -m netfission` is the command `netfission`."""

import sys

from netfission.cli import main

sys.exit(main())
