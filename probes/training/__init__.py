"""Training of probes: `probes fit`, `validate`, `test` and `verify-data`."""
