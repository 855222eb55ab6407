"""Defects that trainers of this kind have had, and the test that finds each: see mutants.py."""

from defects import files, losses, rollouts, steps, updates

DEFECTS = [*steps.DEFECTS, *rollouts.DEFECTS, *losses.DEFECTS, *updates.DEFECTS, *files.DEFECTS]
