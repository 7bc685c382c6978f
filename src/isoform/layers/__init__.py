"""The parts of a transformer, on torch alone: norms, positions, attention, feed-forward layers, dropout, blocks."""
