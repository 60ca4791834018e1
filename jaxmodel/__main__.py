"""`python -m jaxmodel` is the command line."""

import sys

if not sys.flags.safe_path:
    # Drop the current folder: its files may have the names of modules that are imported later.
    del sys.path[0]

from jaxmodel.cli import main

main()
