"""What a model is asked to do: how a document becomes a sample, and what is lost where the model answers wrongly."""
