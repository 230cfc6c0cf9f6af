"""The initialization for a model that is quantized already."""
