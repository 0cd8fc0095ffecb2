"""Where work runs: in this process, on Ray, under DeepSpeed."""
