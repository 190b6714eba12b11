"""The data sets of EDM's teachers, looked for in ``$CDISTILL_DATA`` under the names that EDM gives their files.

FFHQ and AFHQv2 are used without classes, as EDM does, even if their files hold some. Horizontal flips are allowed in
all; whether they are used is the recipe's choice.
"""

from dataclasses import dataclass, replace

from cdistill.data.files import load_file
from cdistill.data.source import Source, only_train
from cdistill.errors import MismatchError, MissingAssetError
from cdistill.storage.files import data_folder

_CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
_CIFAR_FILES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")


@dataclass(frozen=True)
class DataSet:
    """A data set that has to be fetched once.

    Attributes:
        name: Name in the registry.
        files: Names of its file in the data folder, the preferred one first.
        side: Pixels of an image's side; images are RGB.
        num_classes: Number of classes, 0 without labels.
        advice: How to get it.
    """

    name: str
    files: tuple[str, ...]
    side: int
    num_classes: int
    advice: str

    def load(self, split: str) -> Source:
        """Loads the first of the files that is there.

        Raises:
            MissingAssetError: None is; the message says how to get one and where to put it.
            MismatchError: Its images or classes are not those of the data set.
        """
        folder = data_folder()
        path = next((folder / name for name in self.files if (folder / name).is_file()), None)
        if path is None:
            raise MissingAssetError(
                f"data {self.name!r}: no {' or '.join(self.files)} in {folder}; {self.advice}, and put it there, or "
                "give another path as data"
            )
        source = load_file(path, split)
        if not self.num_classes:
            source = replace(source, labels=None, num_classes=0)
        expected = ((3, self.side, self.side), self.num_classes)
        if (source.shape, source.num_classes) != expected:
            raise MismatchError(
                f"{path}: shape {source.shape}, {source.num_classes} classes; {self.name!r} has shape {expected[0]}, "
                f"{expected[1]} classes; {self.advice}"
            )
        return replace(source, name=self.name)


def load_cifar10(split: str = "train") -> Source:
    """Returns 50,000 photographs of 32x32 pixels in 10 classes ("train"), or 10,000 others ("heldout")."""
    files = ("cifar10-32x32.zip", *_CIFAR_FILES) if split == "train" else _CIFAR_FILES
    return DataSet("cifar10", files, 32, 10, f"fetch {_CIFAR_FILES[0]} from {_CIFAR_PAGE}").load(split)


def load_ffhq(split: str = "train") -> Source:
    """Returns the 70,000 faces of FFHQ at 64x64 pixels."""
    only_train("ffhq64", split)
    return DataSet("ffhq64", ("ffhq-64x64.zip",), 64, 0, _made_from("FFHQ")).load(split)


def load_afhqv2(split: str = "train") -> Source:
    """Returns the 15,803 animal faces of AFHQv2 at 64x64 pixels."""
    only_train("afhqv2-64", split)
    return DataSet("afhqv2-64", ("afhqv2-64x64.zip",), 64, 0, _made_from("AFHQv2")).load(split)


def load_imagenet(split: str = "train") -> Source:
    """Returns ImageNet's 1,281,167 training photographs at 64x64 pixels in 1,000 classes."""
    only_train("imagenet64", split)
    advice = _made_from("ImageNet (ILSVRC 2012)")
    return DataSet("imagenet64", ("imagenet-64x64.zip",), 64, 1000, advice).load(split)


def _made_from(name: str) -> str:
    return f"make it from {name} by dataset_tool.py of https://github.com/NVlabs/edm"
