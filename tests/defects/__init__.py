"""Defects that trainers of this kind have had, and the test that finds each: see mutants.py."""

from defects import (
    bagel,
    brought,
    files,
    forward,
    judges,
    losses,
    preference,
    ratio,
    rollouts,
    sizes,
    state,
    steps,
    strangers,
    updates,
)

FILES = (
    steps,
    rollouts,
    sizes,
    losses,
    ratio,
    preference,
    forward,
    updates,
    state,
    brought,
    strangers,
    files,
    bagel,
    judges,
)
DEFECTS = [defect for file in FILES for defect in file.DEFECTS]
