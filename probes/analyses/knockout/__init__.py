"""Attention knockout of confused image patches: cases, blocked tokens, forwards, effects (Eq. 1, App. C.1)."""
