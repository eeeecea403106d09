"""The reliability board: every promise about files and runs, measured, with the sabotages that must turn it red."""
