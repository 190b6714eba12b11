import numpy as np
import pytest

from tests.archives import random_images


@pytest.fixture
def cifar():
    return random_images(33, 32), np.arange(33) % 10
