"""The stages, each inputs → artifact, and the pipeline that runs them in order."""
