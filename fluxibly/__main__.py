"""`python -m fluxibly` is the command line."""

from fluxibly.cli import main

main()
