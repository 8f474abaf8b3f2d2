"""The files beside this one, each by the commands that its page names."""
