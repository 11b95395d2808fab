"""Studies, pictures, web pages, benchmarks: they import the core and are imported by nothing. `python -m tools.NAME`."""
