"""Tasks, streams of tasks, and the data modules that feed them."""
