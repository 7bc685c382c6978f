"""Models on disk: folders that Hugging Face reads, exact training state, and what may be wrong with either."""
