"""`python -m veiltune`."""

from veiltune.cli import main

main()
