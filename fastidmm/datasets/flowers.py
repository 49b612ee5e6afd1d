"""Oxford Flowers-102: 102 flowers of the United Kingdom, 40 to 258 photographs of each.

Nilsback and Zisserman, ICVGIP 2008; photographs found on the web, for research.
Training is the published training and validation sets together, the paper's "2040 images".
"""

from pathlib import Path

from fastidmm.datasets import About, Item
from fastidmm.preparing.fetch import Remote
from fastidmm.preparing.lists import mat
from fastidmm.preparing.official import Found, Layout, Listed, Official, folders

BASE = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
# Of the dataset's page, in the order of the labels; the archive has numbers only.
NAMES = """
pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold,
tiger lily, moon orchid, bird of paradise, monkshood, globe thistle, snapdragon, colt's foot,
king protea, spear thistle, yellow iris, globe-flower, purple coneflower, peruvian lily,
balloon flower, giant white arum lily, fire lily, pincushion flower, fritillary, red ginger,
grape hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke, sweet william,
carnation, garden phlox, love in the mist, mexican aster, alpine sea holly, ruby-lipped cattleya,
cape flower, great masterwort, siam tulip, lenten rose, barbeton daisy, daffodil, sword lily,
poinsettia, bolero deep blue, wallflower, marigold, buttercup, oxeye daisy, common dandelion,
petunia, wild pansy, primula, sunflower, pelargonium, bishop of llandaff, gaura, geranium,
orange dahlia, pink-yellow dahlia?, cautleya spicata, japanese anemone, black-eyed susan,
silverbush, californian poppy, osteospermum, spring crocus, bearded iris, windflower, tree poppy,
gazania, azalea, water lily, rose, thorn apple, morning glory, passion flower, lotus, toad lily,
anthurium, frangipani, clematis, hibiscus, columbine, desert-rose, tree mallow, magnolia,
cyclamen, watercress, canna lily, hippeastrum, bee balm, ball moss, foxglove, bougainvillea,
camellia, mallow, mexican petunia, bromelia, blanket flower, trumpet creeper, blackberry lily
"""


def _remote(file: str, md5: str) -> Remote:
    return Remote(file, (BASE + file,), md5=md5)


class Flowers(Official):
    """102 classes; 2,040 to train, 6,149 to test."""

    name = "flowers"
    title = "Oxford Flowers-102"
    about = About(102, 2040, 6149)
    layouts = (
        Layout(
            archives=(_remote("102flowers.tgz", "52808999861908f626f3c1f4e79d11fa"),),
            inside=("jpg",),
            files=(
                _remote("setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c"),
                _remote("imagelabels.mat", "e0620be6f572b9609742df49c70aed4d"),
            ),
        ),
    )

    def read(self, found: Found) -> Listed:
        """Image numbers and labels count from 1."""
        labels = mat(found.path("imagelabels.mat"))["labels"]
        sets = mat(found.path("setid.mat"))

        def items(*keys: str) -> list[Item]:
            numbers = [int(number) for key in keys for number in sets[key]]
            return [Item(f"jpg/image_{n:05d}.jpg", int(labels[n - 1]) - 1) for n in numbers]

        names = " ".join(NAMES.split()).split(", ")
        return Listed(names, items("trnid", "valid"), items("tstid"))

    def wrong_copy(self, folder: Path) -> str:
        """The other split that many copies have."""
        for place in folders(folder):
            if all((place / split / "102").is_dir() for split in ("train", "valid")):
                return (
                    "is the Kaggle Flowers split (6,552, 818 and 819 images): results will not "
                    "compare; give the folder of 102flowers.tgz, setid.mat and imagelabels.mat."
                )
        return ""
