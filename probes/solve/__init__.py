"""`probes solve`: linear probes at the optimum of their loss, instead of trained for some epochs.

To follow a batch to a number, read run.py, then the solver of a task, then the mathematics of one site; the README of
the folder above says where to begin.
"""
