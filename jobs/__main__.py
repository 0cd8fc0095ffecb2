"""`python -m jobs` is `budgetdraft`."""

from jobs.cli import main

main()
