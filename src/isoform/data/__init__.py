"""Documents to batches: sources, splits, token stores, the batch plan, and what is in the data."""
