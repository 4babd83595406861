"""Sweeps: methods x learning rates x seeds, judged by a declared rule, and their reports."""
