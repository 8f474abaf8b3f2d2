"""Interactive HTML page that shows predictions per image, layer and patch."""
