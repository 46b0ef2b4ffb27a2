"""job=monitor: what runs, here and on clusters, read from the runs' own files and the schedulers' queues."""
