"""The lab: a local page on which running models are asked, blocked and patched on any photo."""
