"""`budgetdraft plan`: what a config will take here."""
