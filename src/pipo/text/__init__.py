"""Tokenizers and chat templates: the only place that knows strings."""
