"""Utilities shared by both packages: loading untrusted files, atomic writes, run locks, resume checks."""
