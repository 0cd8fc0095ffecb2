"""`python -m jobs` is `budgetdraft`."""

from jobs.cli.app import main

main()
