"""EDM's published teachers by name (Karras et al. 2022); the table is in `cdistill.teachers.official`."""

from functools import partial

from cdistill.teachers.base import load_official

load_cifar10 = partial(load_official, "edm-cifar10")
load_cifar10_ve = partial(load_official, "edm-cifar10-ve")
load_cifar10_cond = partial(load_official, "edm-cifar10-cond")
load_cifar10_cond_ve = partial(load_official, "edm-cifar10-cond-ve")
load_ffhq64 = partial(load_official, "edm-ffhq64")
load_ffhq64_ve = partial(load_official, "edm-ffhq64-ve")
load_afhqv2_64 = partial(load_official, "edm-afhqv2-64")
load_afhqv2_64_ve = partial(load_official, "edm-afhqv2-64-ve")
load_imagenet64 = partial(load_official, "edm-imagenet64")
