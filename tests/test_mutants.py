"""Every known defect is found by the test that names it; mutants.py puts it in."""

import os
import re
from dataclasses import replace

import mutants
import pytest
from defects import DEFECTS
from filelock import FileLock


@pytest.fixture(scope="module")
def unmutated(tmp_path_factory):
    """Where several processes share the defects, one of them checks, and the others wait."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    with FileLock(shared / "unmutated.lock"):
        if not (shared / "unmutated").exists():
            mutants.check_unmutated(DEFECTS)
            (shared / "unmutated").touch()


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_known_defect_is_found_by_its_test(unmutated, defect):
    outcome = mutants.try_out(defect)
    assert outcome.killed, outcome.reason


def test_each_defect_has_a_name_of_its_own_a_place_in_the_code_and_a_test():
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS)
    for defect in DEFECTS:
        assert mutants.mutated(defect) != (mutants.ROOT / defect.file).read_text()
        file, function = defect.test.split("[")[0].split("::")
        source = (mutants.ROOT / "tests" / file).read_text()
        assert re.search(rf"^def {function}\(", source, re.MULTILINE), defect.test


def test_a_defect_whose_place_has_changed_is_named():
    (defect,) = (defect for defect in DEFECTS if defect.name == "velocity-sign")
    with pytest.raises(ValueError, match="'velocity-sign': its old text stands 0 times in"):
        mutants.mutated(replace(defect, old="no such line"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "new, reason",
    [
        ("return  _row_mean(", "passes"),
        ("return row_mean(", 'failed by "NameError'),
        ("return ) _row_mean(", "could not be run"),
    ],
)
def test_a_harmless_change_and_broken_code_are_no_finds(new, reason):
    (defect,) = (defect for defect in DEFECTS if defect.name == "kl-by-std")
    outcome = mutants.try_out(replace(defect, old="return _row_mean(", new=new))
    assert not outcome.killed and reason in outcome.reason
