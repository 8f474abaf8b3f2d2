"""Report finished probe runs: claims, tables and figures on one page."""
