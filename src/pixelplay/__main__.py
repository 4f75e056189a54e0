"""`python -m pixelplay` is the command `pixelplay`."""

import sys

from pixelplay.cli.main import main

sys.exit(main())
