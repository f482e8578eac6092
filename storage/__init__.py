"""What a run is on disk: layout, codec, journal and shards, frame tables, catalog, NeXus.

Knows nobody: no sockets, no Prefect, no analysis.
"""
