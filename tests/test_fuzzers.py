"""What is damaged or forged is refused by name, or read as an independent reader does."""

from __future__ import annotations

import fuzzing
import pytest
from damaged_checkpoints import DAMAGES as OF_CHECKPOINTS
from damaged_lora import DAMAGES as OF_LORAS
from fuzz_checkpoints import Checkpoints
from fuzz_data import DataSets
from fuzz_lora import Loras
from fuzzing import EQUAL, REFUSED

SHORT = {  # how many cases: each kind of damage several times
    Checkpoints: 4 * len(OF_CHECKPOINTS),
    DataSets: 200,
    Loras: 4 * len(OF_LORAS),
}


@pytest.mark.filterwarnings("ignore")  # of other packages, on odd files
@pytest.mark.parametrize("make", SHORT)
def test_what_is_damaged_is_refused_by_name_or_read_as_it_stands(make, tmp_path):
    seen, wrong = fuzzing.sweep(make(tmp_path), SHORT[make], seed=1)
    assert not wrong, wrong[0]
    assert set(seen) == {REFUSED, EQUAL}


def test_a_sweep_tells_what_was_neither_and_how_to_repeat_it():
    def fuzzer(draw):
        return [REFUSED, EQUAL, "odd", 1 / (draw.number - 3)][draw.number]

    seen, wrong = fuzzing.sweep(fuzzer, 4, seed=5)
    assert seen == {REFUSED: 1, EQUAL: 1, "anything else": 2}
    assert "--first 2 --count 1 --seed 5: " in wrong[0] and "AssertionError: odd" in wrong[0]
    assert "--first 3 --count 1 --seed 5: " in wrong[1] and "ZeroDivisionError" in wrong[1]
    assert fuzzing.rng(5, 2).random() == fuzzing.rng(5, 2).random() != fuzzing.rng(5, 3).random()


def test_what_waits_for_ever_is_ended():
    def fuzzer(draw):
        with fuzzing.guarded(1):
            while True:
                pass

    seen, wrong = fuzzing.sweep(fuzzer, 1, seed=0)
    assert seen == {"anything else": 1} and "Hangs: no answer within 1 s" in wrong[0]
