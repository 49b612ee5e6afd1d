"""Train vision transformers when all you have is a few thousand images."""

__version__ = "0.1.0"
