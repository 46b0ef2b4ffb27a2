"""job=monitor: what runs, here and on Slurm, read from the runs' own files and from squeue."""
