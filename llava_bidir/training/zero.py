"""Deprecated alias, removed in the next release: use `llava_bidir.training.deepspeed_strategy.ZeRO`."""

from .deepspeed_strategy import ZeRO

__all__ = ["ZeRO"]
