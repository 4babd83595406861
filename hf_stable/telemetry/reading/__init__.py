"""Views of a run's records: alarms, a diagnosis, a terminal view and a page of figures.

Invariant: it needs only run.json and metrics.jsonl, and imports no torch.
"""
