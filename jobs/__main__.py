"""`python -m jobs` is `budgetdraft`."""

from jobs.cli.main import main

main()
