"""SimCLR: a crop is to be told from all others as the other view of its image.

Source: Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual
Representations", ICML 2020.
"""

from torch import Tensor

from fastidmm.batch import Views
from fastidmm.methods.contrast import Contrast


class SimCLR(Contrast):
    """The two views of an image attract each other: NT-Xent."""

    def kinds(self, views: Views) -> Tensor:
        """The images: a batch has each of them once, and two crops of it."""
        return views.rows
