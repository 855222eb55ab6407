"""Defects that trainers of this kind have had, and the test that finds each: see mutants.py."""

from defects import (
    brought,
    files,
    losses,
    preference,
    ratio,
    rollouts,
    state,
    steps,
    strangers,
    updates,
)

FILES = (steps, rollouts, losses, ratio, preference, updates, state, brought, strangers, files)
DEFECTS = [defect for file in FILES for defect in file.DEFECTS]
