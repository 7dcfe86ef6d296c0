"""Who does the tasks of a map-reduce: this process, processes of this machine, or a Dask cluster."""
