"""What every other package may use: errors, units, the manifest, clock and trace. Imports nothing of pipo."""
