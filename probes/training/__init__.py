"""Probes of a frozen model, trained and solved."""
