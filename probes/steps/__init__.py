"""Steps of long work: each is done once, and again if what it was made from has changed.

Studies, the demo and experiments are made of such steps: record.py has what a step is and what became of it, runner.py
finds those that are missing and runs them, progress.py says when they will end.
"""
