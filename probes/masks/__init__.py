"""Masks as people have them -> the folder layout of `probes.data.folder`; nothing but the command imports this."""
