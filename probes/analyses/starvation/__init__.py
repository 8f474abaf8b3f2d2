"""Accuracy by patch position under causal and bidirectional attention: plain, by class, on flipped images."""
