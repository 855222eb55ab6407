"""Defects that trainers of this kind have had, and the test that finds each: see mutants.py."""

from defects import losses, preference, ratio, rollouts, steps, updates

DEFECTS = [*steps.DEFECTS, *rollouts.DEFECTS, *losses.DEFECTS, *updates.DEFECTS]
DEFECTS += [*ratio.DEFECTS, *preference.DEFECTS]
