"""Checks of a machine and its back end, for `mlx_poe.doctor`.

- recorded: answers that do not depend on any machine, and models that give them
- agreement: rows together and alone, modes and batches, against plain forwards on this machine
- hardware: the machine, its BLAS, what rows and modes cost
- report: what a check says, to read, to paste and as JSON
- examination: all of them, one after the other

The checks run the code that users run.
"""
