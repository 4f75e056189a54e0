"""`python -m pixelplay` is the command `pixelplay`."""

import sys

from pixelplay.cli import main

sys.exit(main())
