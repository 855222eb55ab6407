"""Defects that trainers of this kind have had, and the test that finds each: see mutants.py."""

from defects import brought, losses, rollouts, state, steps, strangers, updates

FILES = (steps, rollouts, losses, updates, state, brought, strangers)
DEFECTS = [defect for file in FILES for defect in file.DEFECTS]
