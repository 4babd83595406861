"""What records tell of a run: alarms in words, a diagnosis, a terminal view and a page of figures.

Law of this package: run.json and metrics.jsonl are all it needs; it imports no torch.
"""
