"""finetune-cli: a folder of photos in, an image classifier that people can trust out."""

__version__ = "0.1.0"
