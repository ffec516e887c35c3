"""Checks of a machine and its back end, for `mlx_poe.doctor`.

- recorded: machine-independent answers, and the models that give them
- agreement: rows together and alone, modes and batches, against plain forwards on this machine
- tracing: traced steps against untraced ones
- hardware: the machine, its BLAS, the costs of rows and modes
- report: the results, as text and as JSON
- examination: runs all checks in order

The checks run the code that users run.
"""
