"""Defects that trainers of this kind have had, and the test that finds each: see mutants.py."""

from defects import losses, rollouts, steps, strangers, updates

FILES = (steps, rollouts, losses, updates, strangers)
DEFECTS = [defect for file in FILES for defect in file.DEFECTS]
