"""Whatever lies in a file, a reader returns or raises a CdistillError, in one line."""

import contextlib
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cdistill.errors import CdistillError
from tests.readers import READERS, broken_file


@pytest.fixture
def place(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("broken")
    monkeypatch.setenv("CDISTILL_ASSETS", str(folder / "assets"))
    return folder


@pytest.mark.parametrize("name", READERS)
def test_every_sound_file_is_read(place, name):
    READERS[name].make(place)
    READERS[name].read(place)


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_a_broken_file_is_read_or_refused(place, name, seed):
    reader = READERS[name]
    if not (place / reader.name).exists():
        reader.make(place)
        (place / "sound").write_bytes((place / reader.name).read_bytes())
    broken_file(reader, place, (place / "sound").read_bytes(), random.Random(seed))
    message = ""
    try:
        reader.read(place)
    except CdistillError as error:
        message = str(error)
    assert name == "recipe" or "\n" not in message  # a recipe's errors are told all at once
    assert len(message) < 5000
    with contextlib.suppress(FileNotFoundError):
        (place / reader.name).write_bytes((place / "sound").read_bytes())
