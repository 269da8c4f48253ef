"""pipo: run language models larger than your memory."""
