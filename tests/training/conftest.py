"""What the tests of training share."""

import pytest
from tiny_runs import make_start


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model, and data to train it on, for the tests of one file."""
    return make_start(tmp_path_factory.mktemp("start"))
