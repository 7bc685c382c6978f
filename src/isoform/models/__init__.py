"""The families: one file each, from its own config to Hugging Face's and back, on the parts of `layers`."""
