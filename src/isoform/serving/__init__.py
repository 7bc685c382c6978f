"""Trained models in use: predictions, generation and scores for new data; the local server and its page."""
