"""The command line: demo, inspect, report, and Lightning's fit, validate and test."""
