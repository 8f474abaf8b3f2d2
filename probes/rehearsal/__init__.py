"""`probes rehearse`: the complete study on random weights of the published sizes, a few steps each."""
