"""Steps of long work: each is done once, and again if what it was made from has changed."""
