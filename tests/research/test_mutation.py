"""Mutation testing changes what runs, one thing at a time, and nothing else."""

import ast

import pytest

from research.mutation import FILES, mutants

SOURCE = '''
def half(numbers: "list[int] | None" = None, *, strict: bool = True) -> int:
    """A docstring with 2 numbers."""
    if numbers is None and not strict:
        raise ValueError(f"No {1 + 1} numbers.")
    numbers.append(3)
    return len(numbers) // 2  # ten: äöü
'''
CHANGES = {
    ("strict: bool = True", "strict: bool = (False)"),
    ("numbers is None and not strict", "(numbers is None or not strict)"),
    ("numbers is None", "(numbers is not None)"),
    ("not strict", "(strict)"),
    ("numbers.append(3)", "pass"),
    ("3", "(4)"),
    ("return len(numbers) // 2", "return None"),
    ("len(numbers) // 2", "(len(numbers) / 2)"),
    ("2  #", "(3)  #"),
}


def test_each_mutant_changes_one_thing_that_runs():
    found = [mutant.text for mutant in mutants("packing", SOURCE)]
    assert sorted(found) == sorted(SOURCE.replace(before, after) for before, after in CHANGES)


@pytest.mark.parametrize("file", FILES)
def test_mutants_of_the_remote_code_are_programs(file, request):
    source = (request.config.rootpath / f"ms_resampler/{file}_ms_resampler.py").read_text()
    for mutant in mutants(file, source)[::10]:
        assert mutant.text != source
        ast.parse(mutant.text)
