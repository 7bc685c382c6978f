"""What a model is worth: streaming metrics, predictions, generation.

Nothing in this room imports torch before it is used: a report looks its metrics up here, and is made without it.
"""
