"""SupCon: a crop is to be told from all others as one of its class.

Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, and its code.
"""

from torch import Tensor

from fastidmm.batch import Views
from fastidmm.methods.contrast import Contrast, ContrastOptions, Width


class SupConOptions(ContrastOptions):
    """The IDMM paper's run is named "dim_256": taken for the projector's width."""

    dim: Width = 256


class SupCon(Contrast):
    """All crops of a class attract each other; a crop has its image's other view, at least."""

    needs_labels = True
    Options = SupConOptions

    def kinds(self, views: Views) -> Tensor:
        """The classes."""
        return views.labels
