"""`python -m jaxmodel` is the command line."""

from jaxmodel.cli import main

main()
