"""`python -m jaxmodel` is the command line."""

import sys

if not sys.flags.safe_path:
    del sys.path[
        0
        # the current folder, in which a file may have the name of a module that is imported from here
        # on
    ]

from jaxmodel.cli import main

main()
