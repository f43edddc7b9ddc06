"""What a run measured: curves, records, charts, loggers and the report."""
