"""Measures pipo against the drive, against memory, and against its peers: `python -m bench`."""
