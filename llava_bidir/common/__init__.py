"""What both packages share, and nothing else of them: reading what somebody else made without executing it, writing
files that are whole or not there, one writer at a time, and going on with a run only as what it was."""
