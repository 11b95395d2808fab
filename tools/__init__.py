"""Studies, pictures, web pages, benchmarks: `python -m tools.NAME`. They import the core; it never imports them."""
