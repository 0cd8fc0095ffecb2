"""MLflow's mirror of a run."""
