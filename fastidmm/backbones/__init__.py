"""One file per family of backbones."""
