"""What a run measured: metrics, curves, records, figures and the report."""
