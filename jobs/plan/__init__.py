"""`budgetdraft plan`: the memory, disk and hours that a config will need on this machine."""
