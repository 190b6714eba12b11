"""1,797 handwritten digits of 8x8 pixels, real, bundled with scikit-learn (UCI ML repository, CC BY 4.0)."""

import torch

from cdistill.data.source import Source, only_train


def load_digits(split: str = "train") -> Source:
    """Returns all 1,797 digits; the 17 grey levels 0..16 are spread over 0..255.

    Raises:
        CdistillError: `split` is not "train"; 1,797 images are too few to divide.
    """
    from sklearn.datasets import load_digits as bundled

    only_train("digits", split)
    pixels, labels = bundled(return_X_y=True)
    images = torch.from_numpy(pixels).reshape(-1, 1, 8, 8)
    return Source("digits", (images * 255 / 16).round().to(torch.uint8), torch.from_numpy(labels).long(), 10)
