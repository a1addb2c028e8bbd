"""Whatever is wrong with a record or a picture is a bad record: a part of what tests/fuzzed_data.py runs."""

import pytest
from fuzzed_data import FORMATS, fuzz_pictures, fuzz_records, good_pictures, most_megabytes

pytestmark = pytest.mark.filterwarnings("ignore")  # of Pillow's, about what is damaged


def test_damaged_records_are_bad_records(tmp_path):
    result = fuzz_records(600, tmp_path)
    assert {"good", "not understood", "malformed turn", "no conversation", "no JSON"} < result.kinds.keys()


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_pictures_are_bad_records(count):
    before = most_megabytes()
    assert len(good_pictures()) == len(FORMATS)
    result = fuzz_pictures(count, seed=1)
    assert {"good", "unreadable image"} < result.kinds.keys()
    assert most_megabytes() - before < 1500
