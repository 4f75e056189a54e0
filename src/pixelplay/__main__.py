"""Run `python -m pixelplay` like the command `pixelplay`."""

import sys

from pixelplay.cli.main import main

sys.exit(main())
